"""What a change did to the graph of a step, in words.

    python train.py --flagfile=mine.flags --run.compile_only --run.dump_dir=before
    ... edit ...
    python train.py --flagfile=mine.flags --run.compile_only --run.dump_dir=after
    python -m llama_fn.tools.graph_diff before after

Compares mesh and rules, ops by scope and phase with their constants, dtypes and shardings, collectives, FLOPs and
memory of every rank that both have, layers and microbatches taken together; lines of source files may move. Exit status
0 where nothing differs, 1 where something does, 2 for wrong input: a repository can test that a refactoring leaves the
graph alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import app

from llama_fn.errors import UserError
from llama_fn.inspect.pages import INDEX, SUMMARY
from llama_fn.tools import command

MEMORY = ("argument_bytes", "result_bytes", "peak_bytes", "peak_at")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Summaries by the folder that holds them: ranks, and below them the evaluation step."""
    summaries = {str(path.parent.relative_to(folder)): path for path in sorted(folder.rglob(SUMMARY))}
    if not summaries:
        raise UserError(f"{folder} holds no {SUMMARY}: give a folder that --run.dump_dir wrote")
    for path in summaries.values():
        if not path.with_name(INDEX).exists():
            raise UserError(f"{path.parent} has no {INDEX}: the dump was cut short; write it again")
    return {name: _summary(path) for name, path in summaries.items()}


def _summary(path: Path) -> dict[str, Any]:
    """UserError for what is no summary, or one of another version of this project."""
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
        _ops(summary), _collectives(summary), list(_other_forms(summary, summary)), dict(summary["flops"])
        summary["mesh"], summary["rules"]
        missing = [name for name in MEMORY if name not in summary["memory"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        missing = [str(error)]
    if missing:
        raise UserError(
            f"{path} is not the summary of a dump that this version wrote (it lacks {', '.join(missing)}). Write it "
            "again with --run.dump_dir"
        )
    return summary


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say what b has and a has not, and the other way round: how it is laid out, then ops and collectives,
    then ops that are as many as before and no longer the same, then what it all costs."""
    for name in ("mesh", "rules"):
        if a[name] != b[name]:
            yield f"{name}: {a[name]} -> {b[name]}"
    for count_of in (_ops, _collectives):
        before, after = count_of(a), count_of(b)
        for what in dict.fromkeys([*before, *after]):
            if before[what] != after[what]:
                yield f"{after[what] - before[what]:+d} {what}"
    yield from _other_forms(a, b)
    for phase in a["flops"]:
        yield from _changed(f"FLOPs, {phase}", a["flops"][phase], b["flops"][phase])
    for name in MEMORY[:3]:
        yield from _changed(name.replace("_", " "), a["memory"][name], b["memory"][name])
    if a["memory"]["peak_bytes"] != b["memory"]["peak_bytes"]:
        yield f"peak now at {b['memory']['peak_at']}, before at {a['memory']['peak_at']}"


def _ops(summary: Mapping[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in summary["ops"]:
        counts[_name(row)] += row["count"]
    return counts


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['op']} in {row['scope']}, {row['phase']}"


def _other_forms(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Ops whose constants, dtype or sharding changed: another attention scale, a product in another dtype."""
    forms: list[dict[str, Counter[str]]] = [{}, {}]
    for each, summary in zip(forms, (a, b), strict=True):
        for row in summary["ops"]:
            each.setdefault(_name(row), Counter())[row["form"]] += row["count"]
    for name in filter(forms[1].__contains__, forms[0]):
        before, after = forms[0][name], forms[1][name]
        if before.total() == after.total() and before != after:
            gone, new = (" and ".join(sorted(x)) for x in (before - after, after - before))
            yield f"{(after - before).total()} of {name}: {gone}  ==>  {new}"


def _collectives(summary: Mapping[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in summary["collectives"]:
        what = f"{row['kind']} over {row['axis']} of {row['bytes']:,} bytes {row['dtype']}"
        source = re.sub(r":\d+", "", row["source"])
        counts[f"{what} in {row['scope']}, {row['phase']}, asked for in {source}"] += row["count"]
    return counts


def _changed(what: str, a: float, b: float) -> Iterator[str]:
    if a != b:
        yield f"{what}: {a:,} -> {b:,}" + (f" ({(b - a) / a * 100:+.1f} %)" if a else "")


def compare(argv: list[str]) -> int:
    if len(argv) != 3:
        raise UserError("give two folders: python -m llama_fn.tools.graph_diff BEFORE AFTER")
    before, after = (load(Path(folder)) for folder in argv[1:])
    status = 0
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in before or name not in after:
            lines = [f"only in {argv[1] if name in before else argv[2]}"]
        else:
            lines = list(difference(before[name], after[name]))
        status |= bool(lines)
        print("\n".join([f"{name}: {'differs' if lines else 'no difference'}", *(f"  {line}" for line in lines)]))
    return status


def main(argv: list[str]) -> None:
    sys.exit(command.status_of(lambda: compare(argv)))


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
