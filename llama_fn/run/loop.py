"""The imperative part of a run, read top to bottom: prepare, compile, restore or begin, then step, log, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_fn import config_fields
from llama_fn.checkpoint import LocalCopies, SavedStep, Store, run_folder
from llama_fn.compiler import stages
from llama_fn.compiler.finite import NonFinite
from llama_fn.config import Config
from llama_fn.config_checks import profiled, resolved
from llama_fn.data.blend import Blend
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import Parts, open_parts
from llama_fn.data.samples import Samples
from llama_fn.data.skips import ranges
from llama_fn.distributed import Processes, by_chief
from llama_fn.distributed import start as start_processes
from llama_fn.hardware import Hardware
from llama_fn.inspect.profiling import Profiler
from llama_fn.launch import launched
from llama_fn.model import train_step
from llama_fn.planner import config_stages
from llama_fn.run import compiling, health, machine_checks, metrics, resume, runtime, stopping
from llama_fn.run.batches import ToDevice, iterator, validation_batches
from llama_fn.run.display import Display
from llama_fn.run.text_samples import TextSamples, pieces_of
from llama_fn.run.workdir_lock import WorkdirLock
from llama_fn.signals import SAVED, UNSAVED, Interrupted, StopRequest, named
from sharding import Mesh

log = logging.getLogger("llama_fn.loop")


@dataclass(frozen=True)
class Run:
    """What a run is made of, once everything is prepared; only the first process of several writes and displays."""

    step: stages.Compiled
    evaluate: stages.Compiled | None
    hyper: train_step.Hyper
    to_device: ToDevice
    batches: BatchIterator
    validation: dict[str, list[train_step.Batch]]
    data: Parts
    store: Store
    writer: metrics.Writer | None
    display: Display | None
    stop: StopRequest
    hardware: Hardware | None
    processes: Processes | None
    profiler: Profiler
    health: health.Health
    mesh: Mesh
    samples: TextSamples | None

    def stopping(self) -> int:
        """The signal that asks to stop; that of any process, so that all stop after the same step."""
        return self.stop.signal if self.processes is None else self.processes.any(self.stop.signal)

    def save(self, cfg: Config, iteration: int, state: train_step.TrainState, local: bool = False) -> None:
        """Save the state as of `iteration`, with all that a resume needs; logs up to there reach the disk first.
        `local`: as an emergency copy."""
        if self.writer is not None:
            self.writer.sync()
        meta = resume.meta(cfg, self.mesh, self.batches, self.data)
        if local:
            self.store.copy(iteration, state, meta)
        else:
            self.store.save(iteration, state, meta, self.step.lowered.inputs)


def run(cfg: Config, flags_text: str = "", backend: compiling.Backend | None = None) -> int:
    """Train as cfg says, resuming what the work folder holds. Returns the exit status (docs/stopping.md).

    `backend`: what compiles the steps instead of the one that cfg names. UserError for wrong input, Interrupted for a
    signal before the first step.
    """
    cfg, launch = resolved(cfg), launched()
    mesh = config_stages.mesh(cfg)
    config_stages.rules(cfg, mesh)  # wrong names are said before data is touched
    runtime.log_to_terminal(None, quiet=launch.rank != 0)
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
        keep = (cfg.run.keep_latest, cfg.run.keep_every)
        local = None
        if cfg.run.local_every:
            local = LocalCopies(run_folder(Path(cfg.run.local_dir), workdir, members), members)
        store = Store(train_step.abstract_state(cfg), workdir / "checkpoints", keep, members, cfg.run.device, local)
        newest = store.find(lambda saved: resume.refuse_changes(cfg, saved), config_fields.flat(cfg))
        load = lambda: _loaded(cfg, workdir, newest)  # noqa: E731
        data, train = load() if members is None else members.in_turn(load)
        return _run(cfg, flags_text, backend, mesh, hardware, members, stop, store, newest, data, train)


def _loaded(cfg: Config, workdir: Path, newest: SavedStep | None) -> tuple[Parts, Samples | Blend]:
    """The data, and the samples that are left to train on; the first process of a machine leaves both on disk."""
    data = open_parts(cfg, workdir)
    if newest is not None:
        resume.refuse_other_data(cfg, newest, data)
    start, consumed, _ = resume.starting_point(newest)
    known = newest.meta["iterator"] if newest is not None else {}
    return data, data.train_samples(cfg, consumed, max(0, cfg.run.steps - start), known)


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
    train: Samples | Blend,
) -> int:  # fmt: skip
    """The rest of `run`, once it is known what there is."""
    chief, workdir = members is None or members.chief, Path(cfg.run.workdir)
    if newest is not None:
        resume.warn_of_other_digits(cfg, mesh, newest)
    start, consumed, tokens = resume.starting_point(newest)
    pieces = pieces_of(cfg, workdir) if cfg.run.sample_every else None
    if chief:
        resume.save_flags(workdir, cfg, flags_text)
    step, evaluate = compiling.compile(cfg, mesh, hardware, members, data.has_validation, backend)
    if members is not None:
        members.all_reached("compiled")
    state = resume.restore_or_begin(cfg, store, newest, step.lowered)
    to_device = ToDevice(cfg, step, members)
    stopping.say_how_long_a_save_takes(cfg, workdir, store.bytes(step.lowered.inputs), chief)
    with ExitStack() as held:
        batches = iterator(cfg, train, to_device, consumed, tokens, ranges(cfg.data.skip))
        held.callback(batches.close)
        validation = validation_batches(cfg, data.valid_samples(cfg), to_device)
        display = Display(cfg.run.steps, start) if chief else None
        runtime.log_to_terminal(display.console if display else None, quiet=not chief)
        if (steps := profiled(cfg)) and steps.stop - 1 <= start:
            log.warning("--run.profile_steps=%s lies before iteration %d, from which this run goes on: nothing is "
                        "profiled", cfg.run.profile_steps, start)  # fmt: skip
        writer = metrics.Writer(cfg, workdir, start) if chief else None
        profiler = Profiler(cfg, 0 if members is None else members.rank, step, hardware)
        for part in (writer, display, profiler):
            if part is not None:
                held.callback(part.close)
        held.callback(store.wait)
        samples = None
        if pieces is not None:
            samples = TextSamples(cfg, pieces, step.lowered, compiling.decoding_options(cfg, members))
        hyper = train_step.hyperparameters(cfg, cfg.run.device)
        monitor = health.Health(cfg.run.stop_after_skipped, cfg.model.compute_dtype == "fp16", start)
        run = Run(
            step, evaluate, hyper, to_device, batches, validation, data, store, writer, display, stop, hardware,
            members, profiler, monitor, mesh, samples,
        )  # fmt: skip
        if display:
            display.start()
        stop.train()
        saved = store.newest if newest is not None and newest.local else start
        status = _train(cfg, start, saved, state, run)
        if members is not None:
            members.barrier()
        return status


@dataclass(frozen=True)
class _Pending:
    """An iteration whose metrics are not looked at yet, so that a device never waits for a log line."""

    iteration: int
    values: dict[str, torch.Tensor]
    seconds: float
    consumed: dict[str, int]


def _train(cfg: Config, start: int, saved: int, state: train_step.TrainState, run: Run) -> int:
    """The loop, from iteration `start` on; `saved`: the newest that a checkpoint has. Batch n + 1 is prepared in a
    thread while step n runs; the metrics of step n - 1 are written after step n has been started."""
    pending: _Pending | None = None

    def look(now: bool = False) -> None:
        """Write the metrics that are pending, if they are to be logged; `now`: they are needed in any case."""
        nonlocal pending
        if pending is None:
            return
        logged = pending.iteration % cfg.run.log_every == 0 or pending.iteration == cfg.run.steps
        if logged or now:
            numbers = {name: value.item() for name, value in pending.values.items()}
            run.health.observe(pending.iteration, numbers)
            if logged and run.writer is not None and run.display is not None:
                row = metrics.record(
                    cfg, pending.iteration, numbers, pending.seconds, run.hardware, pending.consumed
                )  # fmt: skip
                run.display.record(row, run.writer.write(row))
        pending = None

    iteration, began, signal, due = start, time.perf_counter(), 0, False
    while iteration < cfg.run.steps and not (signal := run.stopping()) and not run.health.verdict:
        batch, consumed = run.to_device(next(run.batches)), run.batches.counts()
        if run.processes is not None:
            run.processes.watchdog.begin(iteration)
        run.profiler.before(iteration + 1)
        try:
            state, values = run.step(state, batch, run.hyper)
        except NonFinite as error:  # the state holds old and new values: the end
            run.health.stopped_by = f"in iteration {iteration + 1} {error}"
            break
        iteration += 1
        look()
        if iteration == start + 1 and (memory := runtime.memory_text(cfg.run.device)):
            log.info("after the first step: %s", memory)
        ended = time.perf_counter()
        pending, began = _Pending(iteration, values, ended - began, consumed), ended
        if run.profiler.after(iteration):  # which takes a while to write what it has
            began = time.perf_counter()
        if run.evaluate is not None and iteration % cfg.run.eval_every == 0:
            look()
            _validate(run.evaluate, iteration, state, run)
            began = time.perf_counter()
        if run.samples is not None and iteration % cfg.run.sample_every == 0:
            look()
            texts = run.samples.write(state.params)
            for line in run.writer.samples(iteration, texts) if run.writer is not None else ():
                log.info("%s", line)
            began = time.perf_counter()
        # Behind the validation: a later process goes on after this iteration, and would not make it up.
        due |= iteration % cfg.run.checkpoint_every == 0 or iteration == cfg.run.steps
        if due:
            look(now=True)
            if run.health.may_save:
                run.save(cfg, iteration, state)
                saved, due = iteration, False
        elif cfg.run.local_every and iteration % cfg.run.local_every == 0:
            look(now=True)
            if run.health.may_save:
                run.save(cfg, iteration, state, local=True)
    look(now=True)
    # After a signal; and after a start from a local copy that had nothing more to do.
    if iteration > saved and run.health.may_save and not run.health.verdict:
        run.save(cfg, iteration, state)
        saved = iteration
    run.store.close(saved == iteration)
    return _ended(cfg, iteration, saved, signal, run)


def _validate(evaluate: stages.Compiled, iteration: int, state: train_step.TrainState, run: Run) -> None:
    by_source = {
        name: sum(evaluate(state.params, batch).item() for batch in batches) / len(batches)
        for name, batches in run.validation.items()
    }
    for line in run.writer.validation(iteration, by_source) if run.writer is not None else ():
        log.info("%s", line)


def _ended(cfg: Config, iteration: int, saved: int, signal: int, run: Run) -> int:
    """Say how the run ended; returns its exit status."""
    where = run.store.folder / str(saved) if saved else "none"
    why = run.health.verdict
    if not why and not run.health.may_save:  # every one of them was worth nothing
        why = f"the run ended in {run.health.streak} skipped iterations"
    if why:
        log.error(
            "stopped at iteration %d: %s. Later iterations would not mend it, so none is saved; the last good "
            "checkpoint is %s. Go on from it with another --optim.lr or other data (--run.accept_changes)",
            iteration, why, where,
        )  # fmt: skip
        return health.STATUS
    if signal:
        what = f"saved iteration {iteration} in {where}" if iteration else "nothing to save yet"
        log.info("stopped: %s; the same command goes on from there", what)
        return SAVED if saved else UNSAVED
    memory = runtime.memory_text(cfg.run.device)
    log.info("done: %d iterations, checkpoint %s%s", iteration, where, f"; {memory}" if memory else "")
    return 0
