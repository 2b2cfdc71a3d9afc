"""The collectives as arithmetic on the values of all devices at once, and tensors taken apart and put together.

A value is a list with one tensor per rank of the mesh. Sums run in the order of the group, so they are the same every
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch

from sharding.collectives import axes_of, unstacked
from sharding.mesh import Mesh
from sharding.parts import part_of
from sharding.spec import P

PerDevice = list[torch.Tensor]


def _by_group(mesh: Mesh, axes: str, xs: PerDevice, fn: Callable[[PerDevice], Sequence[torch.Tensor]]) -> PerDevice:
    out: list[Any] = [None] * len(xs)
    for group in mesh.groups(axes_of(axes)):
        for rank, value in zip(group, fn([xs[rank] for rank in group]), strict=True):
            out[rank] = value
    return out


def _own(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]


def _all_gather(mesh: Mesh, xs: PerDevice, axes: str, n: int, dim: int) -> PerDevice:
    return _by_group(mesh, axes, xs, lambda group: [torch.cat(group, dim)] * n)


def _reduce_scatter(mesh: Mesh, xs: PerDevice, axes: str, n: int, dim: int) -> PerDevice:
    return _by_group(mesh, axes, xs, lambda group: _own(reduce(torch.add, group).chunk(n, dim)))


def _all_reduce(mesh: Mesh, xs: PerDevice, axes: str, n: int, kind: str) -> PerDevice:
    op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.add if kind == "sum" else torch.maximum
    return _by_group(mesh, axes, xs, lambda group: [reduce(op, group)] * n)


def _all_to_all(mesh: Mesh, xs: PerDevice, axes: str, n: int, split: int, concat: int) -> PerDevice:
    def exchange(group: PerDevice) -> PerDevice:
        pieces = [x.chunk(n, split) for x in group]
        return [torch.cat([sent[i] for sent in pieces], concat) for i in range(n)]

    return _by_group(mesh, axes, xs, exchange)


def _own_slice(mesh: Mesh, xs: PerDevice, axes: str, n: int, dim: int) -> PerDevice:
    return _by_group(mesh, axes, xs, lambda group: _own([x.chunk(n, dim)[i] for i, x in enumerate(group)]))


def _axis_index(mesh: Mesh, xs: PerDevice, axes: str) -> PerDevice:
    return [torch.tensor(mesh.index(rank, axes_of(axes)), device=x.device) for rank, x in enumerate(xs)]


def _all_gather_start(mesh: Mesh, xs: PerDevice, axes: str, n: int, dim: int) -> PerDevice:
    return _all_gather(mesh, xs, axes, n, 0)


def _all_to_all_start(mesh: Mesh, xs: PerDevice, axes: str, n: int, split: int, concat: int) -> PerDevice:
    return _all_to_all(mesh, xs, axes, n, split, 0)


def _wait(mesh: Mesh, pending: PerDevice, xs: PerDevice, n: int, dim: int) -> PerDevice:
    return [unstacked(each, n, dim) for each in pending]


COLLECTIVES: dict[str, Callable[..., PerDevice]] = {
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
    "own_slice": _own_slice,
    "axis_index": _axis_index,
    "all_gather_start": _all_gather_start,
    "reduce_scatter_start": _reduce_scatter,
    "all_reduce_start": _all_reduce,
    "all_to_all_start": _all_to_all_start,
    "wait": _wait,
}


def _all_gather_matmul(
    mesh: Mesh, xs: PerDevice, ws: PerDevice, axes: str, n: int, transposed: bool
) -> list[PerDevice]:
    whole = _all_gather(mesh, xs, axes, n, 0)
    return [[x @ (w.t() if transposed else w), x] for x, w in zip(whole, ws, strict=True)]


def _matmul_reduce_scatter(mesh: Mesh, xs: PerDevice, ws: PerDevice, axes: str, n: int, transposed: bool) -> PerDevice:
    products = [x @ (w.t() if transposed else w) for x, w in zip(xs, ws, strict=True)]
    return _reduce_scatter(mesh, products, axes, n, 0)


FUSED: dict[str, Callable[..., Sequence[Any]]] = {
    "all_gather_matmul": _all_gather_matmul,
    "matmul_reduce_scatter": _matmul_reduce_scatter,
}


def part(x: torch.Tensor, layout: P, mesh: Mesh, rank: int) -> torch.Tensor:
    """A rank's own copy of its part of a global tensor."""
    return part_of(x.shape, layout, mesh, rank).filled(lambda at: x[at])


def join(parts: Sequence[torch.Tensor], layout: P, mesh: Mesh, shape: Sequence[int]) -> torch.Tensor:
    """The global tensor of `shape` from every rank's part; RuntimeError where ranks disagree about what they share."""
    whole = parts[0].new_empty(shape)
    first: dict[str, int] = {}
    for rank, mine in enumerate(parts):
        held = part_of(shape, layout, mesh, rank)
        twin = first.setdefault(str(held.pieces), rank)
        if twin != rank and not torch.equal(parts[twin].nan_to_num(), mine.nan_to_num()):
            raise RuntimeError(
                f"ranks {twin} and {rank} hold different values of one replicated tensor of shape {tuple(shape)}"
            )
        for at, to in held.pieces:
            whole[at] = mine[to]
    return whole
