"""Steps that a start needs besides its first: other processes compile them meanwhile and leave them in the cache.

A training step and a validation step take seconds of Python each, one core at a time, so a start that compiled them in
turn would leave the other cores idle. The other process is `python -m llama_fn.run.compile_one`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch

import llama_fn
from llama_fn.config import Config
from llama_fn.config_fields import flat

log = logging.getLogger("llama_fn.compiling")
ROOT = Path(llama_fn.__file__).parents[1]
COMMAND = (sys.executable, "-m", "llama_fn.run.compile_one")


@dataclass(frozen=True)
class Step:
    """`which` of a run's steps, as cfg says."""

    which: str
    cfg: Config

    def __str__(self) -> str:
        return f"{self.which}, for batches of {self.cfg.data.global_batch_size} samples"


@contextmanager
def compiled_ahead(steps: Sequence[Step], at_once: int) -> Iterator[Callable[[Step], None]]:
    """Inside, other processes compile `steps`, `at_once` of them at a time; what is given waits until that is done of
    a step, or takes it back where nobody has begun with it. None of them outlives the block."""
    if not steps or not at_once:
        yield lambda _: None
        return
    log.info("meanwhile compiled by another process: %s", "; ".join(map(str, steps)))
    helpers = _Helpers()
    with ThreadPoolExecutor(at_once, "compile_ahead") as pool:
        begun = [(step, pool.submit(helpers.compile, step)) for step in steps]

        def finish(step: Step) -> None:
            for future in [future for each, future in begun if each == step]:
                if not future.cancel():
                    future.result()

        try:
            yield finish
        finally:
            for _, future in begun:
                future.cancel()
            helpers.end()


@dataclass
class _Helpers:
    """The processes; `ended`: none may begin any more."""

    running: list[subprocess.Popen[str]] = field(default_factory=list)
    ended: bool = False
    lock: Lock = field(default_factory=Lock)

    def compile(self, step: Step) -> None:
        """Waits for a process of its own. Of one that fails a word is said; who asked for the step compiles it then."""
        try:
            with tempfile.TemporaryFile("w+") as said:
                with self.lock:
                    if self.ended:
                        return
                    process = _begun(step, said.fileno())
                    self.running.append(process)
                status = process.wait()
                said.seek(0)
                why = (said.read().strip().splitlines() or ["it said nothing"])[-1]
        except OSError as error:
            status, why = -1, str(error)
        if status and not self.ended:
            log.warning("another process was to compile %s, and failed (status %d): %s", step, status, why)

    def end(self) -> None:
        """Of those that still run, with the compilers that they run."""
        with self.lock:
            self.ended = True
        for process in self.running:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            if process.stdin:
                process.stdin.close()


def _begun(step: Step, said: int) -> subprocess.Popen[str]:
    """A process that compiles a step. It ends when its standard input does, with this one at the latest."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [*COMMAND, step.which], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=said, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # its status tells
        # Code depends on the number of threads, which is this process's.
        process.stdin.write(json.dumps(flat(step.cfg) | {"run.threads": torch.get_num_threads()}) + "\n")
        process.stdin.flush()
    return process
