"""From one sharding to another in the fewest collectives, for one annotation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sharding.collectives import all_gather, all_reduce, all_to_all, own_slice, reduce_scatter
from sharding.mesh import Mesh
from sharding.spec import P

Step = tuple[Any, tuple[str, ...], tuple[Any, ...]]  # op, mesh axes, further arguments


def steps(source: P, target: P, mesh: Mesh) -> list[Step]:
    """The collectives in order: sums first, as they shrink what is moved after them, gathers last."""
    plan = _Plan(source, target, mesh)
    return [*plan.scatters(), *plan.reduces(), *plan.exchanges(), *plan.slices(), *plan.gathers()]


class _Plan:
    def __init__(self, source: P, target: P, mesh: Mesh) -> None:
        self.order = [name for name, _ in mesh.axes]
        self.dims = [list(axes) for axes in source.by_dim]
        self.target = target.by_dim
        self.unreduced = set(source.unreduced)

    def _missing(self, dim: int) -> tuple[str, ...]:
        """Axes that the target has after those that the dimension has now; none if the two do not begin alike."""
        have, want = self.dims[dim], self.target[dim]
        return want[len(have) :] if list(want[: len(have)]) == have else ()

    def scatters(self) -> Iterator[Step]:
        for dim in range(len(self.dims)):
            axes: list[str] = []
            for axis in self._missing(dim):
                if axis not in self.unreduced:
                    break
                axes.append(axis)
            if axes:
                self.unreduced -= set(axes)
                self.dims[dim] += axes
                yield reduce_scatter.op, tuple(axes), (dim,)

    def reduces(self) -> Iterator[Step]:
        if self.unreduced:
            axes = tuple(axis for axis in self.order if axis in self.unreduced)
            self.unreduced.clear()
            yield all_reduce.op, axes, ("sum",)

    def exchanges(self) -> Iterator[Step]:
        for dim in range(len(self.dims)):
            for axis in self._missing(dim):
                held = [d for d, axes in enumerate(self.dims) if axes and axes[-1] == axis and d != dim]
                if not held or axis in self.target[held[0]]:
                    break
                self.dims[held[0]].pop()
                self.dims[dim].append(axis)
                yield all_to_all.op, (axis,), (dim, held[0])

    def slices(self) -> Iterator[Step]:
        for dim in range(len(self.dims)):
            used = {axis for axes in self.dims for axis in axes}
            axes = self._missing(dim)
            if axes and not used & set(axes):
                self.dims[dim] += axes
                yield own_slice.op, axes, (dim,)

    def gathers(self) -> Iterator[Step]:
        for dim, want in enumerate(self.target):
            have = self.dims[dim]
            same = 0
            while same < min(len(have), len(want)) and have[same] == want[same]:
                same += 1
            if have[same:]:
                yield all_gather.op, tuple(have[same:]), (dim,)
                del have[same:]
        yield from self.slices()
