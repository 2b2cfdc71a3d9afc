"""Ranges of samples that a run passes over: text that made its loss jump, once it is known which."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from llama_fn.config import Config
from llama_fn.config_checks import whole_number
from llama_fn.errors import UserError
from llama_fn.files import atomic

Ranges = Sequence[tuple[int, int]]
FILE = "skips.json"  # in the work folder: what the run itself chose to pass over (run/spikes.py)


def ranges(text: str) -> list[tuple[int, int]]:
    """[(first, last + 1)] of "FROM:TO,FROM:TO", rising. UserError for anything else."""
    found = []
    for word in filter(None, text.split(",")):
        first, _, last = word.strip().partition(":")
        numbers = whole_number(first), whole_number(last)
        if numbers[0] is None or numbers[1] is None or numbers[0] >= numbers[1]:
            raise UserError(
                f"--data.skip={text}: {word.strip()} is not FROM:TO, two numbers of consumed samples as train.log has "
                "them, such as 81920:82944"
            )
        found.append((numbers[0], numbers[1]))
    for (_, end), (begin, _) in pairwise(found):
        if begin < end:
            raise UserError(f"--data.skip={text}: ranges must rise, and {begin} comes before {end} is passed")
    return found


def keep(workdir: Path, first: int, last: int) -> None:
    """Pass over these samples from now on, in later starts and replays, too."""
    kept = [*_kept(workdir), (first, last)]
    with atomic(workdir / FILE) as f:
        json.dump(kept, f)


def with_kept(cfg: Config, workdir: Path) -> Config:
    """cfg with what its run chose to pass over beside --data.skip."""
    joined: list[list[int]] = []
    for first, last in sorted([*ranges(cfg.data.skip), *_kept(workdir)]):
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    return replace(cfg, data=replace(cfg.data, skip=",".join(f"{first}:{last}" for first, last in joined)))


def _kept(workdir: Path) -> list[tuple[int, int]]:
    path = workdir / FILE
    if not path.exists():
        return []
    try:
        return [(int(first), int(last)) for first, last in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): it says which samples the run passes over, as [[FROM, TO], ...]. Write it "
            "again from the spikes in events.jsonl"
        ) from None


def after(position: int, size: int, skipped: Ranges) -> int:
    """Where the next `size` samples begin that no range has any of, from `position` on."""
    for first, last in skipped:
        if first < position + size and position < last:
            position = last
    return position


def ahead(position: int, size: int, skipped: Ranges) -> int:
    """How many samples a run that stands at `position` will pass over, reading `size` at a time."""
    total = 0
    for first, last in skipped:
        if last > position:
            begins = max(position, first - (first - position) % size) if first > position else position
            total, position = total + last - begins, last
    return total
