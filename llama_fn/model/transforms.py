"""Functions from functions: gradients over trees, microbatch accumulation, remat, named scopes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from kernels.repeat import repeated
from kernels.rms_norm import upcast
from kernels.scope import named_scope, phase, remat_region, source_line
from kernels.scope_names import ACCUMULATE, microbatch, of_path
from llama_fn import tree
from llama_fn.tree import Leaf, Tree

__all__ = ["accumulate", "by_leaf", "named_scope", "phase", "remat", "repeated", "value_and_grad"]


def value_and_grad(fn: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, Tree]]:
    """`fn(params, *args) -> scalar tensor` into `(params, *args, cotangent=) -> (value, grads)`.

    grads is a tree like params. `cotangent` (a scalar tensor, default one) scales the gradient before the backward
    starts, which is where a loss scale belongs.
    """

    def transformed(params: Tree, *args: Any, cotangent: torch.Tensor | None = None) -> tuple[torch.Tensor, Tree]:
        leaves, spec = tree.flatten(params)
        value, pull, *_ = torch.func.vjp(lambda *flat: fn(tree.unflatten(spec, flat), *args), *leaves)
        with phase("backward"):
            seed = torch.ones_like(value) if cotangent is None else cotangent.to(value.dtype)
            grads = pull(seed)
        return value, tree.unflatten(spec, grads)

    return transformed


def accumulate(
    fn: Callable[..., tuple[torch.Tensor, Tree]], params: Tree, parts: Sequence[Tree], **kwargs: Any
) -> tuple[torch.Tensor, Tree]:
    """Sum of `fn(params, part) -> (value, grads)` over microbatches; grads of several are summed in float32 or wider.

    `fn` must close over no tensor: it is traced once for all parts.
    """
    once = repeated(fn)
    total: tuple[torch.Tensor, Tree] | None = None
    for i, part in enumerate(parts):
        with named_scope(microbatch(i)):
            value, grads = once(params, part, **kwargs)
        with phase("backward"), named_scope(microbatch(i, ACCUMULATE)), source_line():
            if len(parts) > 1:
                grads = by_leaf(upcast, grads)
            total = (value, grads) if total is None else (total[0] + value, by_leaf(torch.add, total[1], grads))
    assert total is not None
    return total


def by_leaf(fn: Callable[..., Leaf], *trees: Tree) -> Tree:
    """tree.map, each leaf in the scope of its path: layers/3/wq."""

    def one(path: str, *leaves: Leaf) -> Leaf:
        with named_scope(of_path(path)):
            return fn(*leaves)

    return tree.map_with_path(one, *trees)


def remat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, whose inner values may be computed again in the backward instead of being kept for it.

    Which of them is decided when the step is lowered (passes/remat.py), when their bytes on a device are known: one
    trace serves every policy. Call it in a named scope of its own.
    """

    @wraps(fn)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with remat_region():
            return fn(*args, **kwargs)

    return marked
