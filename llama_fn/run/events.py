"""events.jsonl: what happened to a run, over all its attempts, and what each second of them went to.

One object a line, never taken back: `time` (seconds since 1970), `event`, and what belongs to it.

    start      pid, host, devices, mesh, device, backend, versions, command
    training   iteration from which it trains, steps; `restored` whether a checkpoint was there
    spent      iteration, and seconds by PARTS since the start; about once a minute, and before an end
    saved      iteration, seconds that the loop waited
    spike      iteration, loss, the usual one, action; where the run went back: back_to, an iteration, and the samples
               from and to that it passes over
    end        status, iteration, why
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llama_fn.errors import status_of_error
from llama_fn.signals import Interrupted

log = logging.getLogger("llama_fn.events")
FILE = "events.jsonl"
PARTS = ("other", "prepare", "compile", "restore", "step", "data", "save", "evaluate")
SPENT_EVERY_S = 60.0


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


class Events:
    """Of one attempt; `path` None: of a process that leaves them to another. Each moment belongs to one part: entering
    a phase within another ends the other's time until it is left."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.spent, self.iteration = path, dict.fromkeys(PARTS, 0.0), 0
        self._part, self._since, self._said = PARTS[0], time.monotonic(), time.monotonic()

    def write(self, event: str, **facts: Any) -> None:
        """Append a line. A disk that is full, which costs lines here, is not this file's to report."""
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
        try:
            with open(self.path, "ab+") as file:
                if file.tell() and not _ends_a_line(file):  # of a process that was killed, or found no room
                    line = "\n" + line
                file.write((line + "\n").encode())
        except OSError as error:
            log.warning("%s: %s; an event is lost: %s", self.path, error.strerror, event)

    @contextmanager
    def phase(self, part: str) -> Iterator[None]:
        """Time belongs to `part` until the block ends."""
        outer = self._enter(part)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, part: str) -> str:
        now, outer = time.monotonic(), self._part
        self.spent[outer] += now - self._since
        self._part, self._since = part, now
        return outer

    def done(self, iteration: int) -> None:
        """An iteration more is done; says now and then what time went to."""
        self.iteration = iteration
        if time.monotonic() - self._said > SPENT_EVERY_S:
            self.account()

    def account(self) -> None:
        """Say what time went to."""
        self._enter(self._part)
        self._said = time.monotonic()
        self.write("spent", iteration=self.iteration, **{name: round(s, 3) for name, s in self.spent.items()})

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """The block's end is the attempt's: an error that leaves it is told."""
        try:
            yield
        except BaseException as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self.end(status_of_error(error), str(error) if isinstance(error, Interrupted) else said)
            raise

    def end(self, status: int, why: str) -> None:
        """The attempt is over."""
        self.account()
        self.write("end", status=status, iteration=self.iteration, why=why[:2000])
