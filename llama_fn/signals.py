"""SIGTERM, Ctrl-C and the like: at once while a run is prepared, after the step, with everything saved, once it
trains."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

log = logging.getLogger("llama_fn.signals")
GRACE_S = 10.0  # what is under way has this long to leave its files in order
SAVED, UNSAVED = 5, 6  # exit statuses of a run that was asked to stop: with all that it computed on disk, or not


class Interrupted(KeyboardInterrupt):
    """A signal that came while there was nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped before the first step; nothing to save")
        self.status = UNSAVED


def named(text: str) -> list[int]:
    """The signals of "SIGTERM,SIGUSR1"; ValueError naming what is none, or cannot be handled."""
    numbers = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        number = getattr(signal, name, None) if name.startswith("SIG") and not name.startswith("SIG_") else None
        if number is None or number in (signal.SIGKILL, signal.SIGSTOP):
            raise ValueError(f"{name} is no signal that a program can handle")
        numbers.append(int(number))
    return numbers


class StopRequest:
    """Until `train()` a signal, Ctrl-C or one of `numbers`, raises Interrupted in the main thread; from then on it is
    kept in `signal`, for the loop to look at between steps. A second Ctrl-C leaves at once."""

    def __init__(self, numbers: Sequence[int] = (signal.SIGTERM,)) -> None:
        self.numbers = dict.fromkeys((*numbers, signal.SIGINT))
        self.signal, self.training, self.leaving = 0, False, False
        self._previous: dict[int, Any] = {}
        self._hook: Any = None

    def install(self) -> StopRequest:
        """Python lets the main thread alone have handlers: elsewhere signals act as they did."""
        if threading.current_thread() is not threading.main_thread():
            log.warning("not in the main thread: a signal ends this run at once, without saving")
            return self
        for number in self.numbers:
            self._previous[number] = signal.signal(number, self._on_signal)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._on_lost
        return self

    def train(self) -> None:
        """From here on signals wait for the loop to look."""
        self.training = True

    def leave(self) -> None:
        """An interruption is on its way out: no further one."""
        self.leaving = True

    def remove(self) -> None:
        """Give signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self._hook is not None and sys.unraisablehook == self._on_lost:
            sys.unraisablehook = self._hook

    def _on_lost(self, lost: sys.UnraisableHookArgs) -> None:
        """Python has nowhere to raise what is raised while it collects garbage or deletes an object. Of our own that is
        no news: _insist raises it again."""
        if not isinstance(lost.exc_value, Interrupted):
            self._hook(lost)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            os.write(2, b"second interrupt: leaving without saving\n")
            os._exit(UNSAVED)
        first, self.signal = not self.signal, number
        if self.training:
            os.write(2, f"{signal.Signals(number).name}: stopping after this step, then saving\n".encode())
        elif not self.leaving:
            if first:
                threading.Thread(target=self._insist, args=(number,), daemon=True).start()
            raise Interrupted(number)

    def _insist(self, number: int) -> None:
        """Interrupt again where the exception was lost, and end the process that is still there after GRACE_S, in a
        compiler that is waited for."""
        for _ in range(int(GRACE_S / 0.2)):
            time.sleep(0.2)
            if not self.leaving and not self.training:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
        if not self.training:
            os._exit(UNSAVED)
