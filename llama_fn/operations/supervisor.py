"""Starts a command again when it crashes or stands still, from its last good checkpoint, until it is done.

Which end is a crash is told by the exit status (docs/stopping.md) and, since torchrun makes 1 of every status, by the
last word in the work folder's events.jsonl. Wrong input and ruined numbers would come again: those are left alone.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_fn.operations.attempts import read
from llama_fn.operations.state import Condition, Limits, Watcher
from llama_fn.run import health
from llama_fn.signals import SAVED, UNSAVED

log = logging.getLogger("llama_fn.supervise")
GAVE_UP = 7  # exit status: started too often without getting anywhere
FINAL = {0: "done", 2: "the input is wrong", health.STATUS: "its numbers are ruined"}
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_HOST = re.compile(r"rank \d+ on (\S+) (?:stands|has given)")  # distributed/watchdog.py
EXCLUDE = "{exclude}"


@dataclass
class Supervisor:
    """`command`, whose run trains in `workdir`. Words of it that hold {exclude} get the hosts that others named
    `bad_after` times, and are left out while there are none. `wait_s`: before the first start again, doubled each time
    up to `longest_s`; begun anew by an iteration that is further than any before. `most`: starts again in a row that
    got no further. `grace_s`: from a signal to a kill."""

    command: Sequence[str]
    workdir: Path
    limits: Limits
    most: int = 10
    wait_s: float = 10.0
    longest_s: float = 600.0
    grace_s: float = 600.0
    look_s: float = 10.0
    bad_after: int = 2
    accused: Counter[str] = field(default_factory=Counter)
    _process: subprocess.Popen[bytes] | None = None
    _asked: int = 0  # the signal that ended the supervising

    def run(self) -> int:
        """Until it is done; returns the exit status: the command's last one, or GAVE_UP."""
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        furthest, futile, attempt = self._iteration(), 0, 0
        while True:
            attempt += 1
            tried = len(read(self.workdir))
            status, why = self._one(attempt)
            status = self._meant(status, tried)
            if self._asked or status in FINAL:
                log.info("start %d ended with status %d: %s", attempt, status, FINAL.get(status, "asked to stop"))
                return status
            reached = self._iteration()
            futile, furthest = (0, reached) if reached > furthest else (futile + 1, furthest)
            if futile > self.most:
                log.error("%d starts in a row got no further than iteration %d: giving up", futile, furthest)
                return GAVE_UP
            wait = min(self.wait_s * 2 ** max(0, futile - 1), self.longest_s) if status not in (SAVED, UNSAVED) else 0.0
            log.warning("start %d ended at iteration %d: %s; starting again in %.0f s", attempt, reached, why, wait)
            if self._asked or self._slept(wait):
                return status

    def _one(self, attempt: int) -> tuple[int, str]:
        """Run it once; the exit status, and why it ended."""
        path = self.workdir / "supervise" / f"start_{attempt:04d}_{time.strftime('%Y%m%d_%H%M%S')}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._process = process = subprocess.Popen(
            self._words(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        log.info("start %d: process %d, output also in %s", attempt, process.pid, path)
        said = threading.Thread(target=self._copy, args=(process, path), daemon=True)
        said.start()
        why, watcher = "", Watcher(self.workdir, self.limits)
        while process.poll() is None:
            time.sleep(min(self.look_s, 1.0) if self._asked else self.look_s)
            if not why and not self._asked and (state := watcher.look()).condition is Condition.STUCK:
                why = f"it is {state.condition.value}, {state.words}"
                log.error("%s: stopping it", why)
                self._end(process)
        self._kill(process)  # what its children left
        said.join(timeout=10)
        return process.returncode, why or _status(process.returncode)

    def _words(self) -> list[str]:
        bad = [host for host, count in self.accused.items() if count >= self.bad_after]
        if bad:
            log.warning("left out: %s, named by others %d times or more", ", ".join(bad), self.bad_after)
        return [word.replace(EXCLUDE, ",".join(bad)) for word in self.command if bad or EXCLUDE not in word]

    def _copy(self, process: subprocess.Popen[bytes], path: Path) -> None:
        """Its output to the terminal and into a file; who is accused of standing still is noted, once a start."""
        named: set[str] = set()
        assert process.stdout is not None
        with open(path, "wb", buffering=0) as file:
            for line in process.stdout:
                file.write(line)
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
                named |= set(_HOST.findall(line.decode(errors="replace")))
        self.accused.update(named)

    def _meant(self, status: int, before: int) -> int:
        """The status that its first process left with, where the launcher says 1 of every failure. `before`: attempts
        that there were before this one."""
        tried = read(self.workdir)
        last: dict[str, Any] = (tried[-1].end or {}) if len(tried) > before else {}
        return int(last.get("status", status)) if status == 1 else status

    def _iteration(self) -> int:
        """The furthest that any start came."""
        return max((attempt.iteration for attempt in read(self.workdir)), default=0)

    def _slept(self, seconds: float) -> bool:
        """Whether a signal came meanwhile."""
        until = time.monotonic() + seconds
        while not self._asked and time.monotonic() < until:
            time.sleep(min(0.2, max(0.0, until - time.monotonic())))
        return bool(self._asked)

    def _pass_on(self, number: int, frame: Any) -> None:
        self._asked = number
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """With a signal first, so that its stacks and logs reach the disk."""
        process.terminate()
        try:
            process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            self._kill(process)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _status(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
