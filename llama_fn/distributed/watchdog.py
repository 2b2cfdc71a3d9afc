"""Watches the other processes of a run: one that dies or stands still ends the others, with its rank in the error.

Every process tells a shared store, several times per timeout, that it lives and which step it has begun. A rank whose
word does not change for the timeout is gone; one that has not begun the step that this rank has been in for the timeout
is stuck. Without this the others would wait inside a collective, and the error would name nobody.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from datetime import timedelta

import torch.distributed as dist

from llama_fn.distributed.hangs import GivingUp

EXIT_STATUS = 3


class Watchdog:
    """Runs in a thread from `start` to `close`; `begin(step)` is called by the loop."""

    def __init__(self, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout_s
        self.step, self.closed, self.turns = -1, threading.Event(), Counter[str]()
        self.begun = time.monotonic()  # this step
        self.give_up = GivingUp(rank)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        self.store = dist.PrefixStore("llama_fn.watch", store)
        self.seen = {r: (b"", time.monotonic()) for r in range(world)}  # last word, and when it was new
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> Watchdog:
        """Watch from now on; returns itself."""
        self._sign_of_life()
        self.thread.start()
        return self

    def begin(self, step: int) -> None:
        """This process begins `step`: a sign of life."""
        self.step, self.begun = step, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()
        self.thread.join(timeout=5)

    def turn(self, about: str) -> str:
        """Another name for a matter each time it comes up, which it does for all processes in one order: what was said
        the time before is no answer."""
        self.turns[about] += 1
        return f"{about}.{self.turns[about]}"

    def report(self, about: str, word: str) -> None:
        """Let the others know; once for each matter."""
        self.store.set(f"{about}.{self.rank}", word)

    def forget(self, about: str) -> None:
        """Take back what was reported about a matter, once all have read it: the store is in memory."""
        self.store.delete_key(f"{about}.{self.rank}")

    def heard(self, about: str) -> list[str] | None:
        """Everybody's word, None while one has not given theirs."""
        keys = [f"{about}.{rank}" for rank in range(self.world)]
        return [self.store.get(key).decode() for key in keys] if self.store.check(keys) else None

    def forget_all(self, about: str) -> None:
        """Take back what everybody reported about a matter; by the one process that reads it."""
        for rank in range(self.world):
            self.store.delete_key(f"{about}.{rank}")

    def wait_for_all(self, about: str) -> list[str]:
        """Everybody's word, once all have given theirs, however long that takes."""
        keys = [f"{about}.{rank}" for rank in range(self.world)]
        while not self.store.check(keys):
            time.sleep(0.1)
        return [self.store.get(key).decode() for key in keys]

    def tell(self, about: str, text: str) -> None:
        """Let all know; by one process, once for each matter."""
        self.store.set(about, text)

    def told(self, about: str) -> str:
        """What one process tells all, once it has, however long that takes."""
        while not self.store.check([about]):
            time.sleep(0.05)
        return str(self.store.get(about).decode())

    def _sign_of_life(self) -> None:
        self.store.set(str(self.rank), f"{time.time():.3f} {self.step} {socket.gethostname()}")

    def _run(self) -> None:
        while not self.closed.wait(min(5.0, self.timeout / 5)):
            try:
                self._sign_of_life()
                words = {r: self.store.get(str(r)) for r in range(self.world) if self.store.check([str(r)])}
            except RuntimeError as error:  # DistError and its kinds
                if not self.closed.is_set():
                    self.give_up(
                        EXIT_STATUS, f"the store on rank 0 ({os.environ['MASTER_ADDR']}) does not answer: {error}"
                    )
                return
            for rank, word in words.items():
                self._judge(rank, word)

    def _judge(self, rank: int, word: bytes) -> None:
        now = time.monotonic()
        if word != self.seen[rank][0]:
            self.seen[rank] = word, now
        _, step, host = word.decode().split()
        last = f"in step {step}" if int(step) >= 0 else "before its first step"
        # A word is some seconds old, in which quick steps pass: to be behind means nothing while this rank goes on.
        if int(step) < self.step and now - self.begun > self.timeout:
            self.give_up(
                EXIT_STATUS,
                f"rank {rank} on {host} was last heard of {last}, and this rank waits in step {self.step}",
            )
        if now - self.seen[rank][1] > self.timeout:
            self.give_up(
                EXIT_STATUS,
                f"rank {rank} on {host} has given no sign of life for {self.timeout:.0f} s ({last})",
            )
