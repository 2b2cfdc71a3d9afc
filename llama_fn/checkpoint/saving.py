"""Saving beside the run: every process writes its own regions, the first lets Orbax make a checkpoint of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llama_fn.checkpoint import tensors
from llama_fn.checkpoint.host_copy import HostCopy
from llama_fn.checkpoint.integrity import SHARDS, sums_of_process, write_list
from llama_fn.checkpoint.layout import Stored
from llama_fn.checkpoint.orbax import Checkpoints, of_disk
from llama_fn.distributed import Processes

log = logging.getLogger("llama_fn.checkpoint")
SPARE_BYTES = 16 << 20  # of a disk, besides the arrays


class Saver:
    """One save at a time, in a thread. One that fails is said, and the run goes on: the next may succeed.

    `checkpoints`: of the first process, None in the others. `failure`: of the last save, "" where it succeeded.
    """

    def __init__(self, checkpoints: Checkpoints | None, processes: Processes | None) -> None:
        self.checkpoints, self.processes = checkpoints, processes
        self.rank = processes.rank if processes else 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.host, self.count, self.failure = HostCopy(), 0, ""

    def begin(self, iteration: int, state: Any, meta: dict[str, Any], arrays: Mapping[str, Stored]) -> None:
        """Copy what this process writes of `arrays`, and start. The state may be overwritten once this returns."""
        self.wait()
        values = self.host.of(state, arrays)
        self.count += 1
        name = f"save.{self.count}"

        def write(folder: Path) -> None:
            self._write(name, folder, arrays, values)

        if self.checkpoints is None:
            self.pending = self.thread.submit(self._follow, name, write)
        else:
            self.pending = self.thread.submit(self._lead, self.checkpoints, name, iteration, arrays, meta, write)

    def _lead(
        self, checkpoints: Checkpoints, name: str, iteration: int, arrays: Mapping[str, Stored], meta: dict[str, Any],
        write: Callable[[Path], None],
    ) -> None:  # fmt: skip
        """The first process's save: Orbax, which calls `begun`."""
        told = False

        def begun(folder: Path) -> None:
            nonlocal told
            self._tell(name, str(folder))
            told = True
            write(folder)

        try:
            needed = sum(array.bytes for array in arrays.values()) + SPARE_BYTES
            if (free := shutil.disk_usage(checkpoints.folder).free) < needed:
                raise OSError(f"it takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free; nothing was begun")
            checkpoints.begin(iteration, arrays, meta, begun)
            checkpoints.commit(iteration)
            self.failure = ""
        except Exception as error:  # orbax, tensorstore and asyncio each have their own: said here, whatever it is
            if not told:
                self._tell(name, "")
            self.failure = checkpoints.failed(iteration, error)
            log.error("%s. The run goes on", self.failure, exc_info=None if of_disk(error) else error)

    def _follow(self, name: str, write: Callable[[Path], None]) -> None:
        """Another process's: where to, the first one says; "" where it could not begin."""
        assert self.processes is not None
        if folder := self.processes.watchdog.told(name):
            write(Path(folder))

    def _tell(self, name: str, text: str) -> None:
        if self.processes is not None:
            self.processes.watchdog.tell(name, text)

    def _write(
        self, name: str, folder: Path, arrays: Mapping[str, Stored], values: Mapping[str, list[torch.Tensor]]
    ) -> None:
        """Write what is this process's; the first lists what all have written. OSError there where one could not."""
        mine = tensors.process_folder(folder, self.rank)
        try:
            mine.mkdir()
            tensors.write(folder, self.rank, arrays, values)
            word = json.dumps(sums_of_process(folder, mine))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # the first process waits for a word
            word = f"failed: {error or type(error).__name__}"
        words = self.words(name, word)
        if self.checkpoints is None:
            return
        if failed := [f"process {rank}: {each[8:]}" for rank, each in enumerate(words) if each.startswith("failed: ")]:
            raise OSError("; ".join(failed))
        write_list(folder.parent / SHARDS, {file: sums for each in words for file, sums in json.loads(each).items()})

    def words(self, about: str, word: str) -> list[str]:
        """What every process says."""
        return [word] if self.processes is None else self.processes.words(about, word)

    def wait(self) -> None:
        """Until nothing is being written here."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()
