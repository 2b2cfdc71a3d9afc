"""Where in a global tensor the part of one device lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from sharding.mesh import Mesh
from sharding.spec import P

Region = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """A device's part: of which regions of the global tensor it is made, each with where in the part it lies, and its
    shape. What no region covers is padding, zero."""

    pieces: tuple[tuple[Region, Region], ...]
    shape: tuple[int, ...]

    def filled(self, values: Callable[[Region], torch.Tensor]) -> torch.Tensor:
        """The part, a tensor of its own, from the values of regions of the global tensor."""
        mine: torch.Tensor | None = None
        for at, to in self.pieces:
            piece = values(at)
            if tuple(piece.shape) == self.shape:
                return piece.clone(memory_format=torch.contiguous_format)
            if mine is None:
                mine = piece.new_zeros(self.shape)
            mine[to] = piece
        assert mine is not None
        return mine


def whole(shape: Sequence[int]) -> Part:
    """All of a tensor."""
    at = tuple(slice(0, size) for size in shape)
    return Part(((at, at),), tuple(shape))


def part_of(shape: Sequence[int], layout: P, mesh: Mesh, rank: int) -> Part:
    """What a rank holds of a tensor of the global `shape`; shorter regions than the part where that ends in padding."""
    by_dim = [_spans(size, layout.axes(dim), mesh, rank) for dim, size in enumerate(shape)]
    widths = [-(-size // mesh.extent(layout.axes(dim))) for dim, size in enumerate(shape)]
    rest = [slice(0, span.stop - span.start) for span in by_dim]
    if not layout.blocks:
        return Part(((tuple(by_dim), tuple(rest)),), tuple(widths))
    count, stage = mesh.extent(layout.axes(0)), mesh.index(rank, layout.axes(0))
    ends = list(accumulate(layout.blocks))
    pieces, filled = [], 0
    for end, size in list(zip(ends, layout.blocks, strict=True))[stage::count]:
        pieces.append(((slice(end - size, end), *by_dim[1:]), (slice(filled, filled + size), *rest[1:])))
        filled += size
    return Part(tuple(pieces), (slots(layout.blocks, count), *widths[1:]))


def boundaries(shape: Sequence[int], layout: P, mesh: Mesh) -> list[set[int]]:
    """Of each dimension, where regions that devices hold begin and end."""
    found: list[set[int]] = []
    for dim, size in enumerate(shape):
        count = mesh.extent(layout.axes(dim))
        width = -(-size // count)
        found.append({min(i * width, size) for i in range(count + 1)})
    if layout.blocks:
        found[0] = {0, *accumulate(layout.blocks)}
    return found


def slots(blocks: Sequence[int], count: int) -> int:
    """Of dimension 0 on every device, where `count` of them take these blocks in turn."""
    return max(sum(blocks[device::count]) for device in range(count))


def _spans(size: int, axes: tuple[str, ...], mesh: Mesh, rank: int) -> slice:
    width, at = -(-size // mesh.extent(axes)), mesh.index(rank, axes)
    return slice(min(at * width, size), min((at + 1) * width, size))
