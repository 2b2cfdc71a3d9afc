"""The imperative part of a run, read top to bottom: prepare, compile, restore or begin, then train (training.py)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llama_fn.checkpoint import LocalCopies, Store, run_folder
from llama_fn.config import Config
from llama_fn.config_checks import resolved
from llama_fn.data import rampup, skips
from llama_fn.distributed import GivingUp, Processes, by_chief, preflight
from llama_fn.distributed import start as start_processes
from llama_fn.hardware import Hardware
from llama_fn.launch import launched
from llama_fn.model import arrays, train_step
from llama_fn.planner import config_stages
from llama_fn.planner.links import bandwidth
from llama_fn.run import compiling, machine_checks, runtime
from llama_fn.run.display import terminal
from llama_fn.run.events import FILE, Events
from llama_fn.run.stretches import Parts, stretches
from llama_fn.run.versions import command, versions
from llama_fn.run.workdir_lock import WorkdirLock
from llama_fn.signals import Interrupted, StopRequest, named
from sharding import Mesh

log = logging.getLogger("llama_fn.loop")
CACHE_BYTES = 200 * 2**20  # that compiled code takes at the most, about
STUCK = "stuck"  # in the work folder: what processes that gave up left


def run(cfg: Config, flags_text: str = "", backend: compiling.Backend | None = None) -> int:
    """Train as cfg says, resuming what the work folder holds. Returns the exit status (docs/stopping.md).

    `backend`: what compiles the steps instead of the one that cfg names. UserError for wrong input, Interrupted for a
    signal before the first step.
    """
    cfg, launch = resolved(cfg), launched()
    mesh = config_stages.mesh(cfg)
    # What is wrong is said before data is touched.
    config_stages.rules(cfg, mesh)
    rampup.of(cfg.data)
    skips.ranges(cfg.data.skip)
    console = terminal() if launch.rank == 0 else None
    runtime.log_to_terminal(console, quiet=launch.rank != 0)
    machine_checks.check_machine(cfg, launch.world)
    hardware = runtime.setup(cfg.run)
    if cfg.run.compile_only:
        compiling.compile_only(cfg, mesh, hardware)
        return 0
    machine_checks.check_processes(cfg, mesh, launch.world)
    with ExitStack() as held:
        members = start_processes(mesh, cfg.run.device, cfg.run.timeout_s)
        if members is not None:
            held.callback(members.close)
        stop = held.enter_context(_stoppable(cfg.run.stop_signals))
        workdir = Path(cfg.run.workdir)
        by_chief(members, lambda: held.enter_context(_locked(workdir)) and None)
        events = held.enter_context(_events(cfg, mesh, members, backend is not None))
        memory = lambda: runtime.memory_text(cfg.run.device)  # noqa: E731
        give_up = GivingUp(launch.rank, workdir / STUCK, memory, events.end)
        if members is not None:
            members.watchdog.give_up = give_up
            if cfg.run.preflight != "off":
                _compare_machines(cfg, members, hardware)
        keep = (cfg.run.keep_latest, cfg.run.keep_every)
        local = None
        if cfg.run.local_every:
            local = LocalCopies(run_folder(Path(cfg.run.local_dir), workdir, members), members)
        store = Store(train_step.abstract_state(cfg), workdir / "checkpoints", keep, members, cfg.run.device, local)
        parts = Parts(cfg, flags_text, backend, mesh, hardware, members, stop, store, events, give_up, console)
        return stretches(parts)


def _compare_machines(cfg: Config, members: Processes, hardware: Hardware | None) -> None:
    """Say what is slow or odd about the machines of the run; UserError for what is wrong."""
    state = arrays.total_bytes(train_step.abstract_state(cfg))
    needed = {cfg.run.workdir: state, str(compiling.cache_folder(cfg)): CACHE_BYTES}
    if cfg.run.local_every:
        needed[cfg.run.local_dir] = state // members.mesh.size * launched().local_world
    axes = [name for name, n in members.mesh.axes if n > 1]
    expected = {axis: bandwidth(axis, members.mesh, hardware) for axis in axes} if hardware else {}
    odd, line = preflight.check(
        members, cfg.run.device, expected, Path(cfg.run.workdir), needed, versions(), cfg.run.preflight == "strict"
    )
    log.info("%s", line)
    for text in odd if members.chief else ():
        log.warning("%s", text)


@contextmanager
def _events(cfg: Config, mesh: Mesh, members: Processes | None, own: bool) -> Iterator[Events]:
    """Of this attempt, from here to its end; written by the first process. `own`: the backend is the caller's."""
    chief = members is None or members.chief
    events = Events(Path(cfg.run.workdir) / FILE if chief else None)
    events.write(
        "start", pid=os.getpid(), host=socket.gethostname(), devices=mesh.size, mesh=str(mesh), device=cfg.run.device,
        backend="own" if own else cfg.run.backend, steps=cfg.run.steps, command=command(), versions=versions(),
    )  # fmt: skip
    with events.attempt():
        yield events


@contextmanager
def _stoppable(signals: str) -> Iterator[StopRequest]:
    stop = StopRequest(named(signals)).install()
    try:
        yield stop
    except Interrupted:
        stop.leave()
        raise
    finally:
        stop.remove()


@contextmanager
def _locked(workdir: Path) -> Iterator[WorkdirLock]:
    machine_checks.make_writable(workdir)
    lock = WorkdirLock(workdir).acquire()
    try:
        yield lock
    finally:
        lock.release()
