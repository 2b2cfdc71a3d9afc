"""Ranges of samples that a run passes over: text that made its loss jump, once it is known which."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from llama_fn.config_checks import whole_number
from llama_fn.errors import UserError

Ranges = Sequence[tuple[int, int]]


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
