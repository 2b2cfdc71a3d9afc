"""How long a save takes, and whether whoever stops the run waits so long."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from llama_fn.config import Config
from llama_fn.launch import launched

log = logging.getLogger("llama_fn.stopping")
TRIED_BYTES = 32 << 20
TORCHRUN_S = 30  # torchrun's own --shutdown-timeout
SHORT_S = 5  # of which nobody needs to hear


def say_how_long_a_save_takes(cfg: Config, workdir: Path, size: int, chief: bool) -> None:
    """Say what a save of `size` bytes from this process takes, from a file of a few megabytes written to `workdir` now,
    and warn where the time from a signal to the kill is shorter. Processes of a machine share what was measured."""
    if not chief:
        return
    told_torchrun = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_S))
    grace = cfg.run.grace_s or (told_torchrun if launched().world > 1 else 0)
    try:
        rate = _rate(workdir, min(TRIED_BYTES, size))
    except OSError as error:  # the save will say more
        log.warning("no file can be written to %s: %s", workdir, error.strerror or error)
        return
    seconds = size * launched().local_world / rate
    told = f"a save writes {size / 1e6:.1f} MB from each process: about {seconds:.0f} s at {rate / 1e6:.0f} MB/s"
    if grace and seconds > grace:
        log.warning(
            "%s, and the run is killed %d s after a signal to stop: raise that (TORCH_ELASTIC_SHUTDOWN_TIMEOUT for "
            "torchrun; elsewhere, such as SLURM's --signal=USR1@SECONDS, say it with --run.grace_s)", told, grace,
        )  # fmt: skip
    elif seconds > SHORT_S:
        log.info("%s", told)


def _rate(folder: Path, size: int) -> float:
    """Bytes/s of a file that is flushed to the disk."""
    path, block = folder / f".rate.{os.getpid()}", os.urandom(1 << 20)
    began = time.perf_counter()
    try:
        with open(path, "wb") as f:
            for _ in range(max(1, size >> 20)):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
        return max(1, size >> 20) * len(block) / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)
