"""The imperative part of a run, read top to bottom: prepare, compile, restore or begin, then train (training.py)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from llama_fn import config_fields
from llama_fn.checkpoint import LocalCopies, SavedStep, Store, run_folder
from llama_fn.config import Config
from llama_fn.config_checks import profiled, resolved
from llama_fn.data import rampup
from llama_fn.data.blend import Blend
from llama_fn.data.parts import Parts, open_parts
from llama_fn.data.samples import Samples
from llama_fn.data.skips import ranges
from llama_fn.distributed import GivingUp, Processes, StepWatch, by_chief
from llama_fn.distributed import start as start_processes
from llama_fn.hardware import Hardware
from llama_fn.inspect.profiling import Profiler
from llama_fn.launch import launched
from llama_fn.model import train_step
from llama_fn.planner import config_stages
from llama_fn.run import compiling, health, machine_checks, metrics, resume, runtime, stopping, training
from llama_fn.run.batches import ToDevice, iterator, validation_batches
from llama_fn.run.display import Display, at_work, terminal
from llama_fn.run.events import FILE, Events
from llama_fn.run.text_samples import TextSamples, pieces_of
from llama_fn.run.versions import command, versions
from llama_fn.run.workdir_lock import WorkdirLock
from llama_fn.signals import Interrupted, StopRequest, named
from sharding import Mesh

log = logging.getLogger("llama_fn.loop")
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
    ranges(cfg.data.skip)
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
        keep = (cfg.run.keep_latest, cfg.run.keep_every)
        local = None
        if cfg.run.local_every:
            local = LocalCopies(run_folder(Path(cfg.run.local_dir), workdir, members), members)
        store = Store(train_step.abstract_state(cfg), workdir / "checkpoints", keep, members, cfg.run.device, local)
        newest = store.find(lambda saved: resume.refuse_changes(cfg, saved), config_fields.flat(cfg))
        load = lambda: _loaded(cfg, workdir, newest)  # noqa: E731
        with events.phase("prepare"), at_work(console, "finding, tokenizing and ordering the data"):
            data, train = load() if members is None else members.in_turn(load)
        return _run(
            cfg, flags_text, backend, mesh, hardware, members, stop, store, newest, data, train, events, give_up,
            console,
        )  # fmt: skip


def _loaded(cfg: Config, workdir: Path, newest: SavedStep | None) -> tuple[Parts, Samples | Blend]:
    """The data, and the samples that are left to train on; the first process of a machine leaves both on disk."""
    data = open_parts(cfg, workdir)
    if newest is not None:
        resume.refuse_other_data(cfg, newest, data)
    start, consumed, _ = resume.starting_point(newest)
    known = newest.meta["iterator"] if newest is not None else {}
    return data, data.train_samples(cfg, consumed, max(0, cfg.run.steps - start), known)


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


def _run(
    cfg: Config, flags_text: str, backend: compiling.Backend | None, mesh: Mesh, hardware: Hardware | None,
    members: Processes | None, stop: StopRequest, store: Store, newest: SavedStep | None, data: Parts,
    train: Samples | Blend, events: Events, give_up: GivingUp, console: Any,
) -> int:  # fmt: skip
    """The rest of `run`, once it is known what there is."""
    chief, workdir = members is None or members.chief, Path(cfg.run.workdir)
    if newest is not None:
        resume.warn_of_other_digits(cfg, mesh, newest)
    start, consumed, tokens = resume.starting_point(newest)
    pieces = pieces_of(cfg, workdir) if cfg.run.sample_every else None
    if chief:
        resume.save_flags(workdir, cfg, flags_text)
    what = "the step and the evaluation" if data.has_validation else "the step"
    with events.phase("compile"), at_work(console, f"compiling {what} with {cfg.run.backend}"):
        steps, evaluate = compiling.compile(
            cfg, mesh, hardware, members, data.has_validation, backend, rampup.configs(cfg, consumed)
        )
        step = steps[cfg.data.microbatches]
        if members is not None:
            members.all_reached("compiled")
    what = "drawing the first parameters" if newest is None else f"restoring iteration {start}"
    with events.phase("restore"), at_work(console, what):
        state = resume.restore_or_begin(cfg, store, newest, step.lowered)
    to_device = ToDevice(cfg, step, members)
    stopping.say_how_long_a_save_takes(cfg, workdir, store.bytes(step.lowered.inputs), chief)
    with ExitStack() as held:
        batches = iterator(cfg, train, to_device, consumed, tokens, ranges(cfg.data.skip), rampup.of(cfg.data))
        held.callback(batches.close)
        validation = validation_batches(cfg, data.valid_samples(cfg), to_device)
        display = Display(cfg.run.steps, start, console) if chief else None
        if (window := profiled(cfg)) and window.stop - 1 <= start:
            log.warning("--run.profile_steps=%s lies before iteration %d, from which this run goes on: nothing is "
                        "profiled", cfg.run.profile_steps, start)  # fmt: skip
        writer = metrics.Writer(cfg, workdir, start) if chief else None
        profiler = Profiler(cfg, 0 if members is None else members.rank, step, hardware)
        watch = StepWatch(cfg.run.step_limit_s, give_up)
        for part in (writer, display, profiler, watch):
            if part is not None:
                held.callback(part.close)
        held.callback(store.wait)
        samples = None
        if pieces is not None:
            samples = TextSamples(cfg, pieces, step.lowered, compiling.decoding_options(cfg, members))
        hyper = train_step.hyperparameters(cfg, cfg.run.device)
        monitor = health.Health(cfg.run.stop_after_skipped, cfg.model.compute_dtype == "fp16", start)
        run = training.Run(
            steps, evaluate, hyper, to_device, batches, validation, data, store, writer, display, stop, hardware,
            members, profiler, monitor, mesh, samples, events, watch,
        )  # fmt: skip
        if display:
            display.start()
        stop.train()
        saved = store.newest if newest is not None and newest.local else start
        events.write("training", iteration=start, steps=cfg.run.steps, restored=newest is not None)
        events.iteration = start
        with events.phase("step"):
            status = training.train(cfg, start, saved, state, run)
        if members is not None:
            members.barrier()
        return status
