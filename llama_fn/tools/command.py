"""How a command of this project ends: wrong input, a full disk and Ctrl-C are one paragraph and a status."""

from __future__ import annotations

import logging
import os
import sys
import typing
from collections.abc import Callable

from absl import flags

from llama_fn.errors import WHOLE, WRONG_INPUT, SaidElsewhere, UserError, nearest, status_of_error, what_to_mend
from llama_fn.files import remove_temporary


def status_of(fn: Callable[[], int]) -> int:
    """The exit status of a command: what `fn()` returns, or 2 for wrong input, 130 for Ctrl-C, each said in one
    paragraph. A fault of our own keeps its traceback."""
    try:
        return fn()
    except SaidElsewhere as error:
        return status_of_error(error)
    except Exception as error:
        if words := what_to_mend(error):
            return _say(words)
        if (whole := getattr(error, WHOLE, "")) == "":
            raise
        print(whole, file=sys.stderr)  # with the frames that tracing folded away
        return status_of_error(error)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted before the first step; nothing to save", file=sys.stderr)
        return status_of_error(interrupt)


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
