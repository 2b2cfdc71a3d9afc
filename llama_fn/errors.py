"""What a user is told when input is wrong: one paragraph with what, where, expected, found, and the next action."""

from __future__ import annotations

import difflib
import errno
import sys
import traceback
from collections.abc import Iterable

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Wrong input. train.py prints the message alone, without a traceback, and exits with status 2."""


class SaidElsewhere(UserError):
    """A UserError that another process of this run prints; this one leaves with the same status."""


WHOLE = "llama_fn_whole_traceback"  # attribute of an error whose frames were folded away
_LAST: list[str] = []  # text, as an exception would keep every tensor of its frames alive


def keep_traceback(error: BaseException) -> str:
    """Remember how an error came about, before frames are folded away; returns it."""
    _LAST[:] = ["".join(traceback.format_exception(error))]
    return _LAST[0]


def full_traceback() -> None:
    """Print the last error of a traced function with all frames, those of torch and of llama_fn too."""
    print(_LAST[0] if _LAST else "no error was folded yet", file=sys.stderr)


def nearest(name: str, known: Iterable[str]) -> str:
    """ "Did you mean x?" for the closest of `known`, or the whole list when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
