"""Nothing silent in a sharding: names that mean nothing, and devices that would all do the same, are errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from sharding.errors import ShardingError
from sharding.mesh import Mesh
from sharding.rules import PRESETS, TABLES, Rules
from sharding.spec import P

_KNOWN = frozenset(axis for rules in PRESETS.values() for table in TABLES for axis in getattr(rules, table))


def nearest(name: str, known: Iterable[str]) -> str:
    """ "Did you mean x?", or all there are."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."


class Names:
    """The logical axes and mesh axes that one partitioning meets."""

    def __init__(self, mesh: Mesh, rules: Rules, declared: Iterable[str]) -> None:
        self.mesh, self.rules = mesh, rules
        self.tables = {axis for table in TABLES for axis in getattr(rules, table)}
        self.declared = set(declared)
        self.annotated: set[str] = set()
        self.sharding: set[str] = set()  # mesh axes over which something is

    def annotation(self, axes: Iterable[str | None], where: str) -> None:
        """ShardingError for a logical axis that neither a table nor a declaration has."""
        for axis in axes:
            if axis is None or axis in self.annotated:
                continue
            known = self.tables | self.declared | _KNOWN
            if axis not in known:
                raise ShardingError(
                    f"{where}: logical axis {axis!r} is in no table of rules and no array is declared with it, so the "
                    f"annotation would do nothing. {nearest(axis, known)}"
                )
            self.annotated.add(axis)

    def layout(self, layout: P) -> None:
        """Count the mesh axes of a layout as in use."""
        for axes in layout.by_dim:
            self.sharding.update(axes)
        self.sharding |= layout.unreduced

    def finish(self) -> None:
        """ShardingError for what was asked for and did nothing."""
        met = self.declared | self.annotated
        for axis in sorted(self.tables - met - _KNOWN):
            raise ShardingError(
                f"rules {self.rules.name}: no array is declared with the logical axis {axis!r} and no annotation "
                f"has it. {nearest(axis, met)}"
            )
        for axis, size in self.mesh.axes:
            if size > 1 and axis not in self.sharding and axis not in self.rules.replicated:
                used = {m for table in TABLES for axes in getattr(self.rules, table).values() for m in axes}
                raise ShardingError(
                    f"nothing is sharded over mesh axis {axis!r}: its {size} devices would all hold and compute the "
                    f"same. The rules name other axes. {nearest(axis, used)} For copies on purpose, name the axis in "
                    "replicated (--mesh.replicated)"
                )
