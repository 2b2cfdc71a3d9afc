"""Scopes and arguments of a step that only have other names in a later one, so that a rename is one change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

Summary = Mapping[str, Any]  # inspect/summary.py
ATTRIBUTES = ("constants", "dtype", "sharding")  # of an op, besides its name


@dataclass(frozen=True)
class Renamed:
    """How often a name was replaced by another: in scopes that hold the very same ops, and in paths of arguments."""

    scopes: Counter[tuple[str, str]]
    arguments: Counter[tuple[str, str]]


def with_names_of(a: Summary, b: Summary) -> tuple[dict[str, Any], Renamed]:
    """`a` with the names that `b` has for the same things, and which those are."""
    scopes, arguments = _scopes(a, b), _arguments(a["donated"], b["donated"])
    names = {old: new for old, new in Counter(_name(x, y, ".") for x, y in arguments.items())}

    def source(text: str) -> str:
        return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), text)

    moved = {
        **a,
        "ops": [{**row, "scope": scopes.get(row["scope"], row["scope"])} for row in a["ops"]],
        "collectives": [
            {**row, "scope": scopes.get(row["scope"], row["scope"]), "source": source(row["source"])}
            for row in a["collectives"]
        ],
        "donated": [arguments.get(path, path) for path in a["donated"]],
    }
    return moved, Renamed(
        Counter(_name(x, y, "/") for x, y in scopes.items()), Counter(_name(x, y, ".") for x, y in arguments.items())
    )


def _scopes(a: Summary, b: Summary) -> dict[str, str]:
    """Scopes of a that b lacks, by those of b, which a lacks, that hold the very same ops."""
    old, new = (_ops_by_scope(summary) for summary in (a, b))
    free = [scope for scope in new if scope not in old]
    renamed: dict[str, str] = {}
    for scope, ops in old.items():
        alike = [other for other in free if new[other] == ops] if scope not in new else []
        if alike:
            renamed[scope] = max(alike, key=lambda other: SequenceMatcher(None, scope, other).ratio())
            free.remove(renamed[scope])
    return renamed


def _ops_by_scope(summary: Summary) -> dict[str, Counter[tuple[Any, ...]]]:
    scopes: dict[str, Counter[tuple[Any, ...]]] = {}
    for row in summary["ops"]:
        key = tuple(row[name] for name in ("phase", "op", "recomputed", *ATTRIBUTES))
        scopes.setdefault(row["scope"], Counter())[key] += row["count"]
    return scopes


def _arguments(a: Sequence[str], b: Sequence[str]) -> dict[str, str]:
    """Paths of a that b lacks, by those of b, which a lacks, where one name of the path differs; of several nobody can
    tell which."""
    renamed: dict[str, str] = {}
    free = [path for path in b if path not in a]
    for path in a:
        alike = [other for other in free if path not in b and _differ_once(path, other)]
        if len(alike) == 1:
            renamed[path] = alike[0]
            free.remove(alike[0])
    return renamed


def _differ_once(a: str, b: str) -> bool:
    before, after = a.split("."), b.split(".")
    return len(before) == len(after) and sum(x != y for x, y in zip(before, after, strict=True)) == 1


def _name(before: str, after: str, separator: str) -> tuple[str, str]:
    """What differs between two paths: they begin and end alike."""
    a, b = before.split(separator), after.split(separator)
    while len(a) > 1 and len(b) > 1 and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return separator.join(a), separator.join(b)
