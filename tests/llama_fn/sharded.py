"""Processes of a run as threads of this one: what checkpoints need of them, without a network."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from llama_fn.errors import SaidElsewhere, UserError


class Words:
    """The store that all share; also what a process's watchdog is asked for."""

    def __init__(self):
        self.held, self.lock = {}, threading.Lock()

    def tell(self, about, text):
        with self.lock:
            self.held[about] = text

    def forget(self, about):
        """Nobody is short of memory here."""

    def told(self, about):
        end = time.monotonic() + 60
        while about not in self.held:
            assert time.monotonic() < end, f"nobody says {about}"
            time.sleep(0.005)
        return self.held[about]


class Member:
    """One of several."""

    def __init__(self, mesh, rank, words):
        self.mesh, self.rank, self.chief, self.watchdog, self.count = mesh, rank, rank == 0, words, 0

    def words(self, about, word):
        self.watchdog.tell(f"{about}.{self.rank}", word)
        return [self.watchdog.told(f"{about}.{rank}") for rank in range(self.mesh.size)]

    def by_chief(self, fn):
        self.count += 1
        name = f"by_chief.{self.count}"
        if self.chief:
            try:
                self.watchdog.tell(name, (fn(), None))
            except UserError as error:
                self.watchdog.tell(name, (None, error))
        value, error = self.watchdog.told(name)
        if error is not None:
            raise error if self.chief else SaidElsewhere(str(error))
        return value


def together(mesh, fn):
    """What fn(member) gives, by rank; the first error is raised."""
    words = Words()
    with ThreadPoolExecutor(mesh.size) as threads:
        return list(threads.map(lambda rank: fn(Member(mesh, rank, words)), range(mesh.size)))
