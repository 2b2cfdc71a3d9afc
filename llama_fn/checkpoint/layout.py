"""Who writes what of an array, and in which chunks it lies on disk.

Every device holds a part of each array (sharding/parts.py), and several may hold the same. A checkpoint has each region
once, written by one of those that hold it. On disk an array is cut into chunks of one shape, and each belongs to one
writer: two writers of one chunk would lose the data of one of them without a word. So the chunks end where regions do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch

from llama_fn import tree
from sharding import Mesh, P
from sharding.parts import Part, Region, boundaries, part_of, whole

CHUNK_BYTES = 16 << 20  # of 4 to 64 MB these are read fastest (benchmarks/checkpoint.py)


@dataclass(frozen=True)
class Stored:
    """An array of a checkpoint: its global shape and dtype, the shape of its chunks, and the regions that this process
    writes, each with where in its part they are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunk: tuple[int, ...]
    written: tuple[tuple[Region, Region], ...]

    @property
    def bytes(self) -> int:
        """Of the whole array."""
        return prod(self.shape) * self.dtype.itemsize


def stored(infos: Any, layouts: Sequence[P] | None, mesh: Mesh, rank: int) -> dict[str, Stored]:
    """By path, for a tree of ArrayInfo whose leaves are sharded by `layouts` over `mesh`; without, this process has all
    of each."""
    by_path = tree.by_path(infos)
    return {
        path: _stored(i, info, layouts[i] if layouts is not None else None, mesh, rank)
        for i, (path, info) in enumerate(by_path.items())
    }


def _stored(number: int, info: Any, layout: P | None, mesh: Mesh, rank: int) -> Stored:
    """Looks at no other rank's part, of which there may be tens of thousands."""
    shape = tuple(info.shape)
    if layout is None:
        layout, mesh, rank = P(*(None for _ in shape)), Mesh(), 0
    mine = part_of(shape, layout, mesh, rank)
    chunk = _small(tuple(map(_grid, shape, boundaries(shape, layout, mesh))), info.dtype.itemsize)
    sharding = {axis for axes in layout.by_dim for axis in axes}
    cut, copied = [[a for a, _ in mesh.axes if (a in sharding) is here] for here in (True, False)]
    copies, place, copy = mesh.extent(copied), mesh.index(rank, cut), mesh.index(rank, copied)
    # Copies are written in turn by those that hold them, so that none writes more than its share.
    written = tuple(
        (at, to)
        for i, (at, to) in enumerate(mine.pieces)
        if all(s.start < s.stop for s in at) and (number + place * len(mine.pieces) + i) % copies == copy
    )
    return Stored(shape, info.dtype, chunk, written)


def _grid(size: int, ends: Iterable[int]) -> int:
    """The longest chunk of a dimension that ends wherever a region does."""
    inner = [end for end in ends if 0 < end < size]
    return gcd(*inner) if inner else max(size, 1)


def _small(chunk: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Cut by divisors, the outermost dimension first, until it is at most CHUNK_BYTES."""
    sizes = list(chunk)
    for d, size in enumerate(sizes):
        rest = prod(sizes[d + 1 :]) * prod(sizes[:d]) * itemsize
        sizes[d] = max((n for n in _divisors(size) if n * rest <= CHUNK_BYTES), default=1)
    return tuple(sizes)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return [*small, *(n // d for d in small)]


def parts(infos: Any, layouts: Sequence[P] | None, mesh: Mesh, rank: int) -> dict[str, Part]:
    """By path, what this process holds."""
    by_path = tree.by_path(infos)
    return {
        path: whole(tuple(info.shape)) if layouts is None else part_of(tuple(info.shape), layouts[i], mesh, rank)
        for i, (path, info) in enumerate(by_path.items())
    }


def written_bytes(arrays: Mapping[str, Stored]) -> int:
    """What this process writes of `arrays`."""
    regions = ((at, array.dtype.itemsize) for array in arrays.values() for at, _ in array.written)
    return sum(prod(s.stop - s.start for s in at) * itemsize for at, itemsize in regions)
