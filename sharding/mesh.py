"""Mesh: named axes and their sizes, as a value. No process group, no device and no global state hangs on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Mesh:
    """Axis names and sizes in order, outermost first: Mesh((("data", 2), ("model", 4)))."""

    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"mesh axes {names}: a name stands twice")
        bad = [(name, size) for name, size in self.axes if size < 1]
        if bad:
            raise ValueError(f"mesh axis sizes must be at least 1, got {bad}")

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """From "data:2,model:4"; an empty text is one device. ValueError on anything else."""
        axes = []
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, size = part.partition(":")
            if not name.isidentifier() or not (size.isascii() and size.isdigit()):
                raise ValueError(f"mesh axes {text!r}: {part!r} is not NAME:SIZE, as in data:2,model:4")
            axes.append((name, int(size)))
        return cls(tuple(axes))

    def extent(self, axes: Iterable[str]) -> int:
        """Number of devices along `axes` together."""
        sizes = dict(self.axes)
        return prod(sizes[axis] for axis in axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank along every axis; the last axis varies fastest."""
        index = {}
        for name, size in reversed(self.axes):
            rank, index[name] = divmod(rank, size)
        return index

    def index(self, rank: int, axes: Sequence[str]) -> int:
        """Position of a rank along several axes taken as one, the first the outermost."""
        at, sizes = self.coordinates(rank), dict(self.axes)
        index = 0
        for axis in axes:
            index = index * sizes[axis] + at[axis]
        return index

    def groups(self, axes: Sequence[str]) -> list[list[int]]:
        """Ranks that differ along `axes` only, each group in the order of :meth:`index`."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            at = self.coordinates(rank)
            groups.setdefault(tuple(v for a, v in at.items() if a not in axes), []).append(rank)
        return [sorted(group, key=lambda rank: self.index(rank, axes)) for group in groups.values()]

    def group_of(self, rank: int, axes: Sequence[str]) -> list[int]:
        """The ranks that differ from `rank` along `axes` only, in the order of :meth:`index`. Looks at no others, of
        which there may be tens of thousands."""
        at, strides, stride = self.coordinates(rank), {}, 1
        for name, size in reversed(self.axes):
            strides[name], stride = stride, stride * size
        found, sizes = [rank - sum(at[axis] * strides[axis] for axis in axes)], dict(self.axes)
        for axis in axes:
            found = [first + i * strides[axis] for first in found for i in range(sizes[axis])]
        return found

    @property
    def size(self) -> int:
        """How many devices there are."""
        return prod(size for _, size in self.axes)

    def __str__(self) -> str:
        return ",".join(f"{name}:{size}" for name, size in self.axes) or "one device"
