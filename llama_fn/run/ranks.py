"""How each process is doing, beside the others: its steps, its wait for data, how fast its device computes, and what
the device says of itself. ranks.jsonl in the work folder has a line for each time.

In one program the fast wait for the slow inside of collectives, so that all take the same time for a step. What tells
them apart is a product of matrices that each does by itself, and how long each waits for its batch.
"""

from __future__ import annotations

import json
import logging
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llama_fn.distributed import Processes
from llama_fn.run import device_state
from llama_fn.run.log_files import keep_records
from llama_fn.run.records import RANKS

log = logging.getLogger("llama_fn.ranks")
SLOW = 1.25  # times the median of all: a device that computes as slowly is named
LATE = 0.05  # of a step, more than the median of all: a process that waits so long for data is named
Row = dict[str, Any]


class Work:
    """A product of matrices, large enough that a device is busy for milliseconds."""

    def __init__(self, device: str) -> None:
        self.module = torch.get_device_module(torch.device(device).type)
        size, self.times, dtype = (384, 8, torch.float32) if device == "cpu" else (4096, 8, torch.bfloat16)
        self.a = torch.ones(size, size, dtype=dtype, device=device)

    def __call__(self) -> float:
        """Milliseconds that it takes now, the best of three."""
        return 1e3 * min(self._timed() for _ in range(3))

    def _timed(self) -> float:
        self.module.synchronize()
        began = time.perf_counter()
        for _ in range(self.times):
            self.a @ self.a
        self.module.synchronize()
        return time.perf_counter() - began


class Ranks:
    """Told every iteration by every process; each `every` iterations they tell each other, and the first writes and
    warns a round later, so that nobody waits. `folder`: where the first process writes, behind iteration `start`."""

    def __init__(self, processes: Processes | None, device: str, every: int, folder: Path | None, start: int) -> None:
        self.processes, self.device, self.every = processes, device, every
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.said: list[int] = []  # iterations whose rows nobody has read yet
        self.told: set[str] = set()
        self.work = Work(device) if every else None
        # A vendor's tool takes a second: it is asked beside the steps, and its answer told in the next round.
        self.pool = ThreadPoolExecutor(1, "device_state")
        self.state = self.pool.submit(device_state.read, device if every else "cpu")
        self.file = None
        if every and folder is not None:
            keep_records(folder / RANKS, start)
            self.file = open(folder / RANKS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def done(self, iteration: int, seconds: float, waited: float) -> bool:
        """An iteration took so long, and waited for its batch so long of it. Whether time was spent on a round."""
        if self.work is None:
            return False
        self.steps.append(seconds)
        self.waits.append(waited)
        if iteration % self.every:
            return False
        self._read()
        row = self._row(iteration)
        self.steps, self.waits = [], []
        if self.processes is None:
            self._write(iteration, [row])
        else:
            self.processes.watchdog.report(_about(iteration), json.dumps(row))
            self.said.append(iteration)
        return True

    def _row(self, iteration: int) -> Row:
        assert self.work is not None
        kind = self.device.split(":")[0]
        memory = {} if kind == "cpu" else {"memory_gb": round(self.work.module.max_memory_allocated() / 1e9, 3)}
        return {
            "rank": 0 if self.processes is None else self.processes.rank, "host": socket.gethostname(),
            "step_ms": round(1e3 * statistics.median(self.steps), 3),
            "data_wait_ms": round(1e3 * statistics.median(self.waits), 3),
            "work_ms": round(self.work(), 3), **memory, **self._device(),
        }  # fmt: skip

    def _device(self) -> dict[str, float]:
        """What the device said of itself since the last round, if it has."""
        if not self.state.done():
            return {}
        said, self.state = self.state.result(), self.pool.submit(device_state.read, self.device)
        return said

    def _read(self) -> None:
        """What all said in the round before, where all have; the first process writes it."""
        while self.said and self.processes is not None:
            words = self.processes.watchdog.heard(_about(self.said[0])) if self.file else []
            if words is None:
                return
            if self.file:
                self._write(self.said[0], [json.loads(word) for word in words])
                self.processes.watchdog.forget_all(_about(self.said[0]))
            self.said.pop(0)

    def _write(self, iteration: int, rows: Sequence[Row]) -> None:
        slow = stragglers(rows)
        if self.file:
            self.file.write(json.dumps({"iteration": iteration, "ranks": rows, "slow": list(slow.values())}) + "\n")
        for key, text in slow.items():
            if key not in self.told:
                log.warning("iteration %d: %s", iteration, text)
        self.told = set(slow)

    def close(self) -> None:
        """Write what all have said."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._read()
        if self.file:
            self.file.close()


def _about(iteration: int) -> str:
    return f"ranks.{iteration}"


def stragglers(rows: Sequence[Row]) -> dict[str, str]:
    """Processes that are slow beside the others, or whose memory has errors, in words by what tells them apart."""
    found = {}
    work, step, wait = (statistics.median(row[name] for row in rows) for name in ("work_ms", "step_ms", "data_wait_ms"))
    for row in rows:
        who = f"rank {row['rank']} on {row['host']}"
        hot = _state(row)
        if row["work_ms"] > SLOW * work:
            times = f"{row['work_ms']:.1f} ms for a product that takes the others {work:.1f}"
            found[f"{row['rank']} work"] = f"{who} is slow: {times}{hot}"
        if row["data_wait_ms"] - wait > LATE * step:
            times = f"{row['data_wait_ms']:.1f} ms a step for its batch, the others {wait:.1f}"
            found[f"{row['rank']} data"] = f"{who} waits {times}"
        if errors := row.get("memory_errors"):
            found[f"{row['rank']} memory"] = f"{who} has {errors:.0f} memory errors that could not be corrected{hot}"
    return found


def _state(row: Mapping[str, Any]) -> str:
    words = [f"{row[name]:.0f} {unit}" for name, unit in (("temperature_c", "°C"), ("power_w", "W")) if name in row]
    return f" ({', '.join(words)})" if words else ""
