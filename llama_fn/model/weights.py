"""Between the state and the model: weights are gathered before they are read, gradients reduced before the optimizer.

Both directions come from one declaration: every parameter's ArrayInfo gives the logical axes, and _TABLES says which
table of the sharding rules lays them out. A collective that comes of it carries the parameter's path and the line of
its declaration, "layers.*.w_gate, llama.py:81".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch

import kernels as k
from kernels.repeat import inlined
from kernels.scope import named_scope, source_line
from kernels.scope_names import GATHER, LAYERS, REDUCE, layer
from llama_fn import tree
from llama_fn.model.arrays import ArrayInfo
from llama_fn.tree import Tree
from sharding import P, constrain


class Stacked(Protocol):
    """Parameters, or their declaration: a dataclass tree with a field `layers`, whose leaves have a leading dimension
    of layers. Of gathered weights `layers` is a list with a tree for each."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def layers(self) -> Tree:
        """Stacked leaves, with a leading L dimension."""
        ...


Params = TypeVar("Params", bound=Stacked)
_TABLES = {GATHER: "compute", REDUCE: "moments"}


def gather(params: Params, infos: Params) -> Params:
    """The weights that the model reads: in the compute layout, `layers` a list with one tree per layer."""
    return gather_layers(gather_rest(params, infos), infos)


def gather_layers(params: Params, infos: Params) -> Params:
    """`params` with the weights of its layers alone as the model reads them.

    Every weight is annotated once, so a sharded parameter is gathered once per matrix wherever this is called.
    """
    flat, spec = tree.flatten(params.layers)
    layers = [tree.unflatten(spec, parts) for parts in zip(*(k.unbind(leaf) for leaf in flat), strict=True)]
    return _annotated_layers(replace(params, layers=layers), infos, GATHER)


def gather_rest(params: Params, infos: Params) -> Params:
    """The same for what is in no layer: embedding, head and last norm."""
    return _annotated_rest(params, infos, GATHER)


def reduce_layers(grads: Params, infos: Params, dtype: torch.dtype | None) -> Params:
    """The transpose of :func:`gather_layers`, but for :func:`stacked`: gradients in the layout of the moments, summed
    over devices in `dtype`; None means the gradients' own."""
    return _annotated_layers(grads, infos, REDUCE, dtype)


def reduce_rest(grads: Params, infos: Params, dtype: torch.dtype | None) -> Params:
    """The transpose of :func:`gather_rest`, as :func:`reduce_layers`."""
    return _annotated_rest(grads, infos, REDUCE, dtype)


def stacked(grads: Params) -> Params:
    """`grads` with the layers of a list stacked again."""
    with named_scope(REDUCE), named_scope(LAYERS):
        return replace(grads, layers=tree.map(lambda *parts: k.stack(parts), *grads.layers))


def _annotated_layers(weights: Params, infos: Params, role: str, dtype: torch.dtype | None = None) -> Params:
    """`layers` is a list here."""

    @inlined
    def annotated(leaves: Tree) -> Tree:
        return _annotated(leaves, infos.layers, role, dtype, f"{LAYERS}.*.", stacked_dims=1)

    layers = []
    with named_scope(role):
        for i, leaves in enumerate(weights.layers):
            with named_scope(layer(i)):
                layers.append(annotated(leaves))
    return replace(weights, layers=layers)


def _annotated_rest(weights: Params, infos: Params, role: str, dtype: torch.dtype | None = None) -> Params:
    with named_scope(role):
        rest = _annotated(replace(weights, layers=()), replace(infos, layers=()), role, dtype)
    return replace(rest, layers=weights.layers)


def _annotated(
    leaves: Tree, infos: Tree, role: str, dtype: torch.dtype | None, within: str = "", stacked_dims: int = 0
) -> Tree:
    """Each leaf cast, then constrained, in the scope and at the line of its declaration."""

    def annotated(path: str, x: torch.Tensor, info: ArrayInfo) -> torch.Tensor:
        with named_scope(path), source_line(f"{within}{path}, {info.source}"):
            return constrain(x.to(dtype or x.dtype), P(*info.axes[stacked_dims:]), _TABLES[role])

    return tree.map_with_path(annotated, leaves, infos)
