"""What a process that gives up leaves behind: where each of its threads stood, what it had sent for, its memory."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from llama_fn import compat

log = logging.getLogger("llama_fn.watch")
STUCK = 8  # exit status of a process whose own step took too long
LAST = 20  # collectives that are listed


@dataclass(frozen=True)
class GivingUp:
    """Ends this process from any of its threads, with a report in `folder` if there is one. `memory`: of its device, in
    words; `tell`: is told the exit status and why."""

    rank: int
    folder: Path | None = None
    memory: Callable[[], str] = str
    tell: Callable[[int, str], None] = lambda status, why: None

    def __call__(self, status: int, why: str) -> NoReturn:
        """The main thread cannot be woken out of a collective or a device's queue, so the process ends here."""
        where = self._report(why) if self.folder else ""
        log.error("rank %d gives up: %s%s; the last complete checkpoint stays, start the same command again",
                  self.rank, why, where)  # fmt: skip
        self.tell(status, why)
        os._exit(status)

    def _report(self, why: str) -> str:
        """Where it is, as words for a log line."""
        assert self.folder is not None
        path = self.folder / f"rank_{self.rank}_{time.strftime('%Y%m%d_%H%M%S')}.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as f:
                process = f"rank {self.rank}, process {os.getpid()} on {socket.gethostname()}"
                f.write(f"{why}\n{process}, {_resident()} {self.memory()}\n")
                f.write(f"\nThe last {LAST} collectives that it entered, oldest first:\n")
                f.writelines(f"  {line}\n" for line in compat.collectives_entered(LAST) or ["none is known"])
                f.write("\nIts threads, the most recent call first:\n")
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)
        except OSError as error:
            return f" (its report could not be written: {error})"
        return f"; where its threads stood is in {path}"


def _resident() -> str:
    """This process's memory on the host."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return ", ".join(" ".join(line.split()) for line in lines if line.startswith(("VmRSS", "VmHWM")))


class StepWatch:
    """Gives up if one step takes longer than `limit_s`, 0 for any time.

    With several processes each watches its own step; that others stand still is the watchdog's to see.
    """

    def __init__(self, limit_s: float, give_up: GivingUp) -> None:
        self.limit, self.give_up = limit_s, give_up
        self.step_began: tuple[int, float] | None = None
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="step-watch", daemon=True)
        if limit_s:
            self.thread.start()

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """While `iteration` is computed."""
        self.step_began = iteration, time.monotonic()
        try:
            yield
        finally:
            self.step_began = None

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()
        if self.limit:
            self.thread.join(timeout=5)

    def _run(self) -> None:
        while not self.closed.wait(min(5.0, self.limit / 5)):
            if (at := self.step_began) and time.monotonic() - at[1] > self.limit:
                self.give_up(STUCK, f"iteration {at[0]} takes longer than {self.limit:g} s (--run.step_limit_s)")
