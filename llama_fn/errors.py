"""What a user is told when input is wrong: one paragraph with what, where, expected, found, and the next action."""

from __future__ import annotations

import difflib
import errno
import sys
import traceback
from collections.abc import Iterable

OUR_FAULT, WRONG_INPUT, CTRL_C = 1, 2, 130  # exit statuses
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_USERS = (
    *FULL_DISK, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOTEMPTY,
)  # fmt: skip


class UserError(ValueError):
    """Wrong input. train.py prints the message alone, without a traceback, and exits with status 2."""


class SaidElsewhere(UserError):
    """A UserError that another process of this run prints; this one leaves with the same status."""


def what_to_mend(error: BaseException) -> str:
    """What to say of an error that the user can mend; "" of a fault of our own, which needs its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory: {error or 'this machine has no more'}. A smaller batch or model takes less"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"{error}: free some space and start the same command again"
    if isinstance(error, OSError) and error.errno in _USERS and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Mend that, or name another path, and start again"
    # torch's, of any device
    if isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error)):
        return f"{str(error).splitlines()[0]}. A smaller batch or model, or --mesh.remat, takes less"
    return ""


def status_of_error(error: BaseException) -> int:
    """The exit status of a process that an error ends."""
    if isinstance(error, KeyboardInterrupt):
        return int(getattr(error, "status", CTRL_C))
    return WRONG_INPUT if what_to_mend(error) else OUR_FAULT


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
