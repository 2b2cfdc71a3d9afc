"""What a run asks of this machine before anything takes time: processes, tools, folders, data that can be read."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from llama_fn.compiler import backends
from llama_fn.compiler.backends import inductor
from llama_fn.config import Config
from llama_fn.config_checks import dump_ranks, without_effect
from llama_fn.data.prepare import check as check_data
from llama_fn.data.skips import ranges
from llama_fn.errors import FULL_DISK, UserError
from sharding import Mesh

log = logging.getLogger("llama_fn.machine_checks")


def check_processes(cfg: Config, mesh: Mesh, world: int) -> None:
    """UserError, before anything takes time, for a mesh of several devices in one process that cannot have them."""
    if mesh.size > 1 and world == 1 and cfg.run.backend != "interpret":
        raise UserError(backends.needs_processes(mesh, cfg.run.backend))
    if world > 1 and cfg.run.backend == "interpret":
        raise UserError("--run.backend=interpret simulates the whole mesh in one process: start it without torchrun")


def check_machine(cfg: Config, world: int) -> None:
    """UserError, before anything is written, for what this machine lacks, data that cannot be used, and a file where a
    folder is wanted; a word for flags that have no effect. `world`: the number of processes."""
    for sentence in without_effect(cfg):
        log.warning("%s", sentence)
    if cfg.run.backend == "inductor":
        inductor.check_tools(cfg.run.device)
    outside = [rank for rank in dump_ranks(cfg.run) or [] if rank >= world]
    if outside and cfg.run.dump_dir:
        raise UserError(f"--run.dump_ranks={cfg.run.dump_ranks}: this run has ranks 0 to {world - 1}")
    for name, path in (("dump_dir", cfg.run.dump_dir), ("workdir", cfg.run.workdir)):
        if path and os.path.lexists(path) and not os.path.isdir(path):
            raise UserError(f"--run.{name}={path} is no folder; name another")
    ranges(cfg.data.skip)
    if not cfg.run.compile_only:
        check_data(cfg)


def make_writable(workdir: Path, flag: str = "run.workdir") -> None:
    """Make the folder; UserError naming `flag` where nothing can be written there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UserError(f"--{flag}={workdir} cannot be written: {error.strerror}; name another folder") from None
