"""How a command of this project ends: wrong input, a full disk and Ctrl-C are one paragraph and a status."""

from __future__ import annotations

import errno
import logging
import os
import sys
import typing
from collections.abc import Callable

from absl import flags

from llama_fn.errors import FULL_DISK, WHOLE, SaidElsewhere, UserError, nearest
from llama_fn.files import remove_temporary

OUR_FAULT, WRONG_INPUT = 1, 2
_USERS = (
    *FULL_DISK, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOTEMPTY,
)  # fmt: skip


def status_of(fn: Callable[[], int]) -> int:
    """The exit status of a command: what `fn()` returns, or 2 for wrong input, 130 for Ctrl-C, each said in one
    paragraph. A fault of our own keeps its traceback."""
    try:
        return fn()
    except SaidElsewhere:
        return WRONG_INPUT
    except UserError as error:
        return _say(str(error))
    except MemoryError as error:
        return _say(f"out of memory: {error or 'this machine has no more'}. A smaller batch or model takes less")
    except OSError as error:
        if error.errno in FULL_DISK:
            return _say(f"{error}: free some space and start the same command again")
        if error.errno in _USERS and error.filename is not None:
            return _say(f"{error.filename}: {error.strerror}. Mend that, or name another path, and start again")
        raise
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):  # torch's, of any device
            return _say(f"{str(error).splitlines()[0]}. A smaller batch or model, or --mesh.remat, takes less")
        return _fault(error)
    except Exception as error:
        return _fault(error)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted before the first step; nothing to save", file=sys.stderr)
        return int(getattr(interrupt, "status", 130))


def _fault(error: Exception) -> int:
    """Of our own: raised again, or printed with the frames that tracing folded away, if it is such an error."""
    if (whole := getattr(error, WHOLE, "")) == "":
        raise error
    print(whole, file=sys.stderr)
    return OUR_FAULT


def parse(argv: list[str], expand: Callable[[list[str]], list[str]] = list) -> list[str]:
    """absl's parser, for the words that `expand` makes of argv: status 2 for a flag that is wrong, and the nearest name
    for one that does not exist."""
    try:
        return flags.FLAGS(expand(argv))
    except flags.UnrecognizedFlagError as error:
        _say(f"--{error.flagname} is not a flag. {nearest(error.flagname, _own_flags())}")
    except (flags.Error, UserError, OSError) as error:
        _say(str(error))
    sys.exit(WRONG_INPUT)


def shown(text: str) -> int:
    """Print a page, of which a reader such as head may not want all; status 0."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return 0


def _own_flags() -> list[str]:
    return [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])] or ["help"]


def leave(status: int) -> typing.NoReturn:
    """End the process, with all that was written on its way, and without waiting for threads of libraries: on a full
    disk they would go on reporting it, and a call that nothing interrupts may take minutes."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    remove_temporary()
    os._exit(status)


def _say(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return WRONG_INPUT
