"""Log files that a run finds in its work folder: cut back to where it goes on, or set aside where it begins anew.

What is cut off comes again, with the same numbers. Nothing else is lost: lines of metrics.jsonl that are no records go
to metrics.rejected.jsonl, and older runs' files to metrics.1.jsonl, train.1.log and so on.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from llama_fn.files import atomic

log = logging.getLogger("llama_fn.log_files")
_ITERATION = re.compile(rb" iteration +(\d+)/| (?:validation loss|sample) at iteration (\d+) ")


def keep_records(path: Path, start: int) -> None:
    """Keep the records of metrics.jsonl, or of norms.jsonl, up to iteration `start`, in rising order."""
    kept: list[bytes] = []
    rejected: list[bytes] = []
    last, first_rejected = 0, 0
    lines, unfinished = _lines(path)
    for number, line in enumerate(lines, 1):
        iteration = _iteration(line)
        if iteration is None or iteration <= last:
            first_rejected = first_rejected or number
            rejected.append(line)
            continue
        last = iteration
        if iteration <= start:
            kept.append(line)
    if rejected:
        target = path.with_name(f"{path.stem}.rejected.jsonl")
        log.warning("%s: line %d is no record of its own iteration; such lines (%d) go to %s", path, first_rejected,
                    len(rejected), target.name)  # fmt: skip
        with open(target, "ab") as f:
            f.writelines(line + b"\n" for line in rejected)
    if lines or unfinished:
        _rewrite(path, kept)


def keep_lines(path: Path, start: int) -> None:
    """Keep the lines of train.log but for those of iterations after `start`."""
    lines, unfinished = _lines(path)
    kept = [line for line in lines if not (m := _ITERATION.match(line)) or int(m[1] or m[2]) <= start]
    if unfinished or len(kept) < len(lines):
        _rewrite(path, kept)


def set_aside(paths: Sequence[Path]) -> None:
    """Give files of an older run, where there are any, names with the next free number."""
    old = [path for path in paths if path.exists() and path.stat().st_size]
    if not old:
        return
    numbered = lambda path, n: path.with_name(f"{path.stem}.{n}{path.suffix}")  # noqa: E731
    n = next(n for n in itertools.count(1) if not any(numbered(path, n).exists() for path in paths))
    for path in old:
        os.replace(path, numbered(path, n))
    log.info("no checkpoint to go on from: logs of an earlier run are kept as %s", numbered(old[0], n).name)


def _lines(path: Path) -> tuple[list[bytes], bool]:
    """The finished lines of a file, and whether an unfinished one follows: the last word of a killed process."""
    if not path.exists():
        return [], False
    *lines, rest = path.read_bytes().split(b"\n")
    return lines, bool(rest)


def _iteration(line: bytes) -> int | None:
    """That of a record, None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    iteration = row.get("iteration") if isinstance(row, dict) else None
    return iteration if type(iteration) is int and iteration > 0 else None


def _rewrite(path: Path, lines: Sequence[bytes]) -> None:
    with atomic(path, "wb") as f:
        f.writelines(line + b"\n" for line in lines)
