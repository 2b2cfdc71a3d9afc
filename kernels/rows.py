"""Many small tensors as one: what lets small collectives travel together.

    join_rows([x, y], n, dims)   [n, S]: row i holds the i-th n-th of every tensor along its dim, flat, in turn
    split_rows(rows, dims, shapes)  the tensors of `shapes` again, row i being their i-th n-th along their dims

`dims` and `shapes` are text, "0,1" and "8x4,16".
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from kernels.registry import Factors, kernel


def _dims(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def shapes_text(shapes: Sequence[Sequence[int]]) -> str:
    """ "4x8,16" for (4, 8) and (16,): the form in which ops carry shapes."""
    return ",".join("x".join(map(str, shape)) for shape in shapes)


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(size) for size in shape.split("x") if size) for shape in text.split(",")]


def join_rows_reference(xs: Sequence[torch.Tensor], n: int, dims: str) -> torch.Tensor:
    """[n, elements / n] of all xs: row i is the i-th of n parts of each, cut in its own dimension."""
    rows = [
        torch.stack([piece.reshape(-1) for piece in x.chunk(n, dim)]) if n > 1 else x.reshape(1, -1)
        for x, dim in zip(xs, _dims(dims), strict=True)
    ]
    return torch.cat(rows, 1)


def split_rows_reference(rows: torch.Tensor, dims: str, shapes: str) -> list[torch.Tensor]:
    """The inverse of join_rows_reference for tensors of these `shapes`."""
    n, at, leaves = rows.shape[0], 0, []
    for dim, shape in zip(_dims(dims), _shapes(shapes), strict=True):
        width = prod(shape) // n
        part = [size // n if d == dim and n > 1 else size for d, size in enumerate(shape)]
        pieces = [row[at : at + width].reshape(part) for row in rows.unbind()]
        leaves.append(torch.cat(pieces, dim) if n > 1 else pieces[0].clone())
        at += width
    return leaves


join_rows = kernel(
    name="join_rows",
    schema="(Tensor[] xs, int n, str dims) -> Tensor",
    reference=join_rows_reference,
    abstract=lambda xs, n, dims: xs[0].new_empty((n, sum(x.numel() for x in xs) // n)),
    factors=lambda *_: Factors(" -> "),
)
split_rows = kernel(
    name="split_rows",
    schema="(Tensor rows, str dims, str shapes) -> Tensor[]",
    reference=split_rows_reference,
    abstract=lambda rows, dims, shapes: [rows.new_empty(shape) for shape in _shapes(shapes)],
    factors=lambda *_: Factors(" -> "),
)
