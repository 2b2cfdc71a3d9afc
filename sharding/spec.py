"""P: which axis, if any, each dimension of a tensor is sharded over."""

from __future__ import annotations

from collections.abc import Iterable


class P:
    """An immutable partition spec: one axis name, tuple of names or None per dimension, as JAX's PartitionSpec.

    Not a tuple, so that a tree of specs has specs for leaves. `unreduced` names the axes over which the value is
    still a partial sum. `blocks`: dimension 0 is cut into blocks of these sizes, which its axis' devices take in turn
    (stages.py); without it every device has one block, all of one size.
    """

    __slots__ = ("blocks", "dims", "unreduced")
    dims: tuple[str | tuple[str, ...] | None, ...]
    unreduced: frozenset[str]
    blocks: tuple[int, ...]

    def __init__(
        self, *dims: str | tuple[str, ...] | None, unreduced: frozenset[str] = frozenset(), blocks: tuple[int, ...] = ()
    ) -> None:
        named = [axis for dim in dims if dim is not None for axis in ((dim,) if isinstance(dim, str) else dim)]
        repeated = {axis for axis in named if named.count(axis) > 1} | (set(named) & unreduced)
        if repeated:
            raise ValueError(f"P{dims}: axis {sorted(repeated)} is used twice; each axis can shard one dimension")
        object.__setattr__(
            self, "dims", tuple(d if d is None or isinstance(d, str) else tuple(d) or None for d in dims)
        )
        object.__setattr__(self, "unreduced", frozenset(unreduced))
        object.__setattr__(self, "blocks", blocks)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("P is immutable; make a new one")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, P) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return self.dims, self.unreduced, self.blocks

    def __len__(self) -> int:
        return len(self.dims)

    def __repr__(self) -> str:
        parts = [repr(dim) for dim in self.dims]
        if self.unreduced:
            parts.append(f"unreduced={sorted(self.unreduced)}")
        if self.blocks:
            parts.append(f"blocks={self.blocks}")
        return f"P({', '.join(parts)})"

    def axes(self, dim: int) -> tuple[str, ...]:
        """The axes that shard a dimension, outermost first."""
        here = self.dims[dim]
        return () if here is None else (here,) if isinstance(here, str) else here

    @property
    def by_dim(self) -> tuple[tuple[str, ...], ...]:
        """The mesh axes of each dimension."""
        return tuple(self.axes(dim) for dim in range(len(self)))

    @classmethod
    def of(cls, by_dim: Iterable[Iterable[str]], unreduced: Iterable[str] = (), blocks: tuple[int, ...] = ()) -> P:
        """From the axes of every dimension."""
        dims = [tuple(axes) for axes in by_dim]
        return cls(*(d[0] if len(d) == 1 else d or None for d in dims), unreduced=frozenset(unreduced), blocks=blocks)

    def encode(self) -> str:
        """The form a graph node carries: dims joined by ',', several axes of a dim by '+', '-' for None."""
        return ",".join("-" if d is None else d if isinstance(d, str) else "+".join(d) for d in self.dims)
