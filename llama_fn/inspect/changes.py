"""What differs between two summaries of steps (inspect/summary.py): changes by kind, each with what it costs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from llama_fn.hardware import FLOPS_PER_HBM_BYTE, FLOPS_PER_LINK_BYTE
from llama_fn.inspect.renames import ATTRIBUTES, Renamed, Summary, with_names_of

MEMORY = ("argument_bytes", "result_bytes", "peak_bytes")
LAID_OUT = ("mesh", "rules", "donation")  # kinds that explain the others, whatever they cost
TOTALS = ("FLOPs", "memory")  # kinds of a few changes each, which follow from the others
SOURCES = 3  # lines of source that a change names
SHOWN, WIDTH = 10, 180  # kinds, and characters of each, that a notebook shows


@dataclass(frozen=True)
class Change:
    """One thing that is no longer the same, in words.

    `flops`, `bytes` (read and written, or of memory) and `sent` (bytes over links) say how much more of each one device
    has per step; `sources` are the lines of the model that it comes from.
    """

    kind: str
    text: str
    flops: int = 0
    bytes: int = 0
    sent: int = 0
    sources: tuple[str, ...] = ()

    @property
    def cost(self) -> float:
        """What may be compared between kinds: FLOPs, and those that could run while the bytes move."""
        if self.kind in LAID_OUT:
            return math.inf
        return abs(self.flops) + FLOPS_PER_HBM_BYTE * abs(self.bytes) + FLOPS_PER_LINK_BYTE * abs(self.sent)

    def __str__(self) -> str:
        if not self.sources:
            return self.text
        more = f" and {len(self.sources) - SOURCES} more" if len(self.sources) > SOURCES else ""
        return f"{self.text} ({'; '.join(self.sources[:SOURCES])}{more})"


class Changes(list[Change]):
    """What differs between two summaries, the costliest kind and change first. A notebook shows a line per kind."""

    def __repr__(self) -> str:
        lines = list(overview(self)) or ["no difference"]
        more = [f"and {len(lines) - SHOWN} more kinds"] if len(lines) > SHOWN else []
        return "\n".join([*(line[:WIDTH] for line in lines[:SHOWN]), *more])

    def _repr_html_(self) -> str:
        return (
            "".join(
                f"<details><summary>{escape(next(overview(group)))}</summary>"
                f"<ul>{''.join(f'<li>{escape(str(change))}</li>' for change in group)}</ul></details>"
                for group in _by_kind(self).values()
            )
            or "no difference"
        )


def changes(a: Summary, b: Summary) -> Changes:
    """All that b has and a has not, and the other way round, by kind; the costliest kind and change first.

    KeyError, TypeError or AttributeError where one is no summary."""
    moved, renamed = with_names_of(a, b)
    unordered = [
        *(Change(name, f"{a[name]} -> {b[name]}") for name in ("mesh", "rules") if a[name] != b[name]),
        *_donation(moved["donated"], b["donated"]), *_collectives(moved, b), *_ops(moved, b), *_renames(renamed),
        *_flops(a["flops"], b["flops"]), *_memory(a["memory"], b["memory"]),
    ]  # fmt: skip
    ordered = sorted(_by_kind(unordered).values(), key=lambda group: -sum(change.cost for change in group))
    return Changes(change for group in ordered for change in sorted(group, key=lambda change: -change.cost))


def overview(several: Sequence[Change]) -> Iterator[str]:
    """A line per kind: how many changes, what they cost together, and the largest of them."""
    for kind, group in _by_kind(several).items():
        if len(group) == 1 or kind in TOTALS:
            yield f"{kind}: {'; '.join(map(str, group))}"
            continue
        totals = [(sum(getattr(c, name) for c in group), unit) for name, unit in (
            ("flops", "FLOP"), ("bytes", "bytes read and written"), ("sent", "bytes sent"),
        )]  # fmt: skip
        costs = "".join(f", {n:+,} {unit}" for n, unit in totals if n)
        yield f"{kind}: {len(group)} changes{costs}; the largest: {group[0]}"


def _by_kind(several: Sequence[Change]) -> dict[str, list[Change]]:
    kinds: dict[str, list[Change]] = {}
    for change in several:
        kinds.setdefault(change.kind, []).append(change)
    return kinds


_Key = tuple[str, str, str]  # its kind, its words, and what else tells it from others


@dataclass
class _Row:
    """Ops of one name, scope and phase, or collectives that are alike."""

    count: int = 0
    flops: int = 0
    bytes: int = 0
    sent: int = 0
    sources: dict[str, None] = field(default_factory=dict)
    attributes: Counter[tuple[str, ...]] = field(default_factory=Counter)


def _ops(a: Summary, b: Summary) -> Iterator[Change]:
    before, after = (_grouped(summary["ops"], _op_name) for summary in (a, b))
    for (kind, name, _), old, new in _pairs(before, after):
        if old.count != new.count:
            yield _counted(kind, name, old, new)
        elif old.attributes != new.attributes:
            for i, what in enumerate(("constant arguments", "dtype", "sharding")):
                yield from _attribute(f"{what} of ops", i, name, old, new)


def _attribute(kind: str, i: int, name: str, old: _Row, new: _Row) -> Iterator[Change]:
    """As many ops as before, whose constants, dtype or sharding are others: "0.125 -> 0.25"."""
    before, after = (Counter[str]() for _ in range(2))
    for row, counts in ((old, before), (new, after)):
        for attributes, n in row.attributes.items():
            counts[attributes[i]] += n
    gone, come = before - after, after - before
    if come:
        words = (" and ".join(sorted(x or "none" for x in counts)) for counts in (gone, come))
        yield Change(
            kind, f"{come.total()} {name}: {' -> '.join(words)}",
            bytes=new.bytes - old.bytes, sources=tuple(new.sources),
        )  # fmt: skip


def _collectives(a: Summary, b: Summary) -> Iterator[Change]:
    before, after = (_grouped(summary["collectives"], _collective_name) for summary in (a, b))
    for (kind, name, _), old, new in _pairs(before, after):
        if old.count != new.count:
            yield _counted(kind, name, old, new)


def _op_name(row: Mapping[str, Any]) -> _Key:
    note = "recomputed " if row["recomputed"] else ""
    return f"{note}ops", f"{row['op']} {note}in {row['scope'] or 'no scope'}, {row['phase']}", ""


def _collective_name(row: Mapping[str, Any]) -> _Key:
    """Alike are those that the same annotations ask for; without lines of the source, which move."""
    what = f"{row['kind']} over {row['axis']} of {row['bytes']:,} bytes {row['dtype']}"
    return "collectives", f"{what} in {row['scope']}, {row['phase']}", re.sub(r":\d+", "", row["source"])


def _grouped(rows: list[dict[str, Any]], key: Callable[[Mapping[str, Any]], _Key]) -> dict[_Key, _Row]:
    groups: dict[_Key, _Row] = {}
    for row in rows:
        group = groups.setdefault(key(row), _Row())
        group.count += row["count"]
        if "kind" in row:  # a collective: bytes are those that one of them sends
            group.sent += row["bytes"] * row["count"]
            group.sources |= dict.fromkeys(row["source"].split("; "))
        else:
            group.flops += row["flops"]
            group.bytes += row["bytes"]
            group.sources |= {line: None for source in row["sources"] for line in source.split("; ")}
            group.attributes[tuple(row[name] for name in ATTRIBUTES)] += row["count"]
    return groups


def _pairs(before: dict[_Key, _Row], after: dict[_Key, _Row]) -> Iterator[tuple[_Key, _Row, _Row]]:
    for key in dict.fromkeys([*before, *after]):
        yield key, before.get(key, _Row()), after.get(key, _Row())


def _counted(kind: str, name: str, old: _Row, new: _Row) -> Change:
    return Change(
        kind, f"{new.count - old.count:+d} {name}", new.flops - old.flops, new.bytes - old.bytes, new.sent - old.sent,
        tuple(new.sources or old.sources),
    )  # fmt: skip


def _donation(a: Sequence[str], b: Sequence[str]) -> Iterator[Change]:
    for path in a:
        if path not in b:
            yield Change("donation", f"{path} is no longer overwritten in place")
    for path in b:
        if path not in a:
            yield Change("donation", f"{path} is now overwritten in place")


def _renames(renamed: Renamed) -> Iterator[Change]:
    for what, names in (("scope", renamed.scopes), ("argument", renamed.arguments)):
        for (before, after), n in names.items():
            yield Change(f"renamed {what}s", f"{before} -> {after} in {n} {what}{'s' * (n > 1)}, otherwise as before")


def _flops(a: Mapping[str, int], b: Mapping[str, int]) -> Iterator[Change]:
    for phase in a:
        if a[phase] != b[phase]:
            yield Change("FLOPs", f"{phase} {_from_to(a[phase], b[phase])}", flops=b[phase] - a[phase])


def _memory(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    for name in MEMORY:
        if a[name] != b[name]:
            at = f", now at {b['peak_at']}, before at {a['peak_at']}" if name == "peak_bytes" else ""
            yield Change(
                "memory", f"{name.replace('_', ' ')} {_from_to(a[name], b[name])}{at}", bytes=b[name] - a[name]
            )


def _from_to(a: int, b: int) -> str:
    return f"{a:,} -> {b:,}" + (f" ({(b - a) / a * 100:+.1f} %)" if a else "")
