"""What a change did to the graph of a step, in words.

    python train.py --flagfile=mine.flags --run.compile_only --run.dump_dir=before
    ... edit ...
    python train.py --flagfile=mine.flags --run.compile_only --run.dump_dir=after
    python -m llama_fn.tools.graph_diff before after

Compares mesh and rules, donated inputs, ops by scope and phase with their constants, dtypes and shardings, collectives,
FLOPs and memory of every rank that both have, layers and microbatches taken together; lines of source files may move.
Prints one line per kind of change, the costliest first; --all prints every change. Exit status 0 where nothing differs,
1 where something does, 2 for wrong input: a repository can test that a refactoring leaves the graph alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.inspect.changes import changes, overview
from llama_fn.inspect.pages import INDEX, SUMMARY
from llama_fn.tools import command

ALL = flags.DEFINE_bool("all", False, "print every change, not one line per kind")


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
        changes(summary, summary)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the summary of a dump that this version wrote (it lacks {error}). Write it again with "
            "--run.dump_dir"
        ) from None
    return summary


def compare(argv: list[str], everything: bool) -> int:
    """Print what differs; exit status 0 where nothing does, else 1."""
    if len(argv) != 3:
        raise UserError("give two folders: python -m llama_fn.tools.graph_diff BEFORE AFTER")
    before, after = (load(Path(folder)) for folder in argv[1:])
    status = 0
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in before or name not in after:
            lines, more = [f"only in {argv[1] if name in before else argv[2]}"], False
        else:
            differences = changes(before[name], after[name])
            short = list(overview(differences))
            lines = [f"{change.kind}: {change}" for change in differences] if everything else short
            more = len(short) < len(differences) and not everything
        status |= bool(lines)
        title = f"{name}: {'differs' if lines else 'no difference'}{'; --all lists every change' if more else ''}"
        print("\n".join([title, *(f"  {line}" for line in lines)]))
    return status


def main(argv: list[str]) -> None:
    """The command: exit status 0, 1 or 2."""
    sys.exit(command.status_of(lambda: compare(argv, ALL.value)))


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse)
