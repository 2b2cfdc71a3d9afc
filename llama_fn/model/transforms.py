"""Functions from functions: gradients over trees, microbatch accumulation, remat, named scopes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from kernels.repeat import fold, inlined, repeated
from kernels.rms_norm import upcast
from kernels.scope import named_scope, phase, remat_region, source_line
from kernels.scope_names import ACCUMULATE, microbatch, of_path
from llama_fn import tree
from llama_fn.tree import Leaf, Tree

__all__ = ["accumulate", "by_leaf", "fold", "inlined", "named_scope", "phase", "remat", "repeated", "value_and_grad"]


def value_and_grad(fn: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, Tree]]:
    """`fn(params, *args) -> scalar tensor` into `(params, *args, cotangent=) -> (value, grads)`.

    grads is a tree like params. `cotangent` (a scalar tensor, default one) scales the gradient before the backward
    starts, which is where a loss scale belongs.
    """

    def transformed(params: Tree, *args: Any, cotangent: torch.Tensor | None = None) -> tuple[torch.Tensor, Tree]:
        leaves, spec = tree.flatten(params)
        value, pull, *_ = torch.func.vjp(lambda *flat: fn(tree.unflatten(spec, flat), *args), *leaves)
        with phase("backward"):
            # Not ones_like, with which the backward would seem to depend on the loss (passes/join_loss.py).
            if cotangent is None:
                cotangent = torch.ones(value.shape, device=value.device)
            grads = pull(cotangent.to(value.dtype))
        return value, tree.unflatten(spec, grads)

    return transformed


def accumulate(
    fn: Callable[..., tuple[torch.Tensor, Tree]], params: Tree, parts: Sequence[Tree], **kwargs: Any
) -> tuple[torch.Tensor, Tree]:
    """Sum of `fn(params, part) -> (value, grads)` over microbatches; grads of several are summed in float32 or wider.

    `fn` must close over no tensor: it is traced once for all parts.
    """

    @repeated
    def microbatch_gradients(params: Tree, part: Tree, kwargs: Any) -> tuple[torch.Tensor, Tree]:
        return fn(params, part, **kwargs)

    with named_scope(microbatch(0)):
        first: tuple[torch.Tensor, Tree] = microbatch_gradients(params, parts[0], kwargs)
    if len(parts) == 1:
        return first
    with phase("backward"), named_scope(microbatch(0, ACCUMULATE)), source_line():
        total = (first[0], by_leaf(upcast, first[1]))

    def accumulated(total: tuple[torch.Tensor, Tree], part: Tree, params: Tree, kwargs: Any) -> Any:
        value, grads = microbatch_gradients(params, part, kwargs)
        with phase("backward"), named_scope(ACCUMULATE), source_line():
            return total[0] + value, by_leaf(torch.add, total[1], by_leaf(upcast, grads))

    scopes = [microbatch(i) for i in range(1, len(parts))]
    summed: tuple[torch.Tensor, Tree] = fold(accumulated, total, parts[1:], (params, kwargs), scopes)
    return summed


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
