"""Inductor's loops for a CPU take another sum of what they compute.

Inductor joins a loop with a sum of its results, and then takes the loop, which has a sum now, for one whose result the
next sum might need: AdamW's loop gets the sum over new parameters, and the updates are written, only to be read and
summed. Which sums are needed by which is known, so that is asked here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def sums_in_loops() -> Iterator[None]:
    """While open, a sum over all that a loop computes joins it, whatever other sums the loop has."""
    from torch._inductor.codegen.cpp import CppScheduling

    can_fuse = CppScheduling.can_fuse_vertical

    def can_fuse_vertical(scheduling: Any, loop: Any, user: Any) -> bool:
        return can_fuse(scheduling, loop, user) or _is_another_sum(loop, user)

    with mock.patch.object(CppScheduling, "can_fuse_vertical", can_fuse_vertical):
        yield


def _is_another_sum(loop: Any, user: Any) -> bool:
    if loop.is_template() or user.is_template() or not (loop.is_reduction() and user.is_reduction()):
        return False
    (_, (kept, summed)), (_, (kept_too, summed_too)) = loop.group, user.group
    if kept or kept_too or summed != summed_too:
        return False
    sums = {each.get_name() for each in loop.get_nodes() if each.is_reduction()}
    return not sums & user.ancestors
