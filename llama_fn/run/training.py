"""The loop of a run: a step, what is looked at, written and saved between steps, and how it ends."""

from __future__ import annotations

import logging
import signal as signals
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from llama_fn.checkpoint import Store
from llama_fn.compiler import stages
from llama_fn.compiler.finite import NonFinite
from llama_fn.config import Config
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import Parts
from llama_fn.distributed import Processes, StepWatch
from llama_fn.hardware import Hardware
from llama_fn.inspect.profiling import Profiler
from llama_fn.model import train_step
from llama_fn.run import health, metrics, resume, runtime
from llama_fn.run.batches import ToDevice
from llama_fn.run.display import Display
from llama_fn.run.events import Events
from llama_fn.run.ranks import Ranks
from llama_fn.run.spikes import Spikes
from llama_fn.run.text_samples import TextSamples
from llama_fn.signals import SAVED, UNSAVED, StopRequest
from sharding import Mesh

log = logging.getLogger("llama_fn.loop")
GO_BACK = -1


@dataclass(frozen=True)
class Run:
    """What a run is made of, once everything is prepared; only the first process of several writes and displays."""

    steps: Mapping[int, stages.Compiled]  # by how many microbatches a batch has
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
    spikes: Spikes
    mesh: Mesh
    samples: TextSamples | None
    events: Events
    watch: StepWatch
    ranks: Ranks

    def stopping(self) -> int:
        """The signal that asks to stop; that of any process, so that all stop after the same step."""
        return self.stop.signal if self.processes is None else self.processes.any(self.stop.signal)

    @property
    def may_save(self) -> bool:
        """Whether the state is worth a checkpoint."""
        return self.health.may_save and self.spikes.found is None

    @property
    def verdict(self) -> str:
        """Why the run must stop now, "" while it need not."""
        return self.health.verdict or self.spikes.verdict

    def save(self, cfg: Config, iteration: int, state: train_step.TrainState, local: bool = False) -> None:
        """Save the state as of `iteration`, with all that a resume needs; logs up to there reach the disk first.
        `local`: as an emergency copy."""
        began = time.monotonic()
        with self.events.phase("save"):
            if self.writer is not None:
                self.writer.sync()
            meta = resume.meta(cfg, self.mesh, self.batches, self.data)
            if local:
                self.store.copy(iteration, state, meta)
            else:
                self.store.save(iteration, state, meta, self.steps[cfg.data.microbatches].lowered.inputs)
        self.events.write("saved", iteration=iteration, seconds=round(time.monotonic() - began, 3), local=local)


@dataclass(frozen=True)
class _Pending:
    """An iteration whose metrics are not looked at yet, so that a device never waits for a log line."""

    iteration: int
    values: dict[str, Any]
    seconds: float
    waited: float  # for its batch, within `seconds`
    consumed: dict[str, int]
    validation: dict[str, float] | None = None


def train(cfg: Config, start: int, saved: int, state: train_step.TrainState, run: Run) -> int:
    """The loop, from iteration `start` on; `saved`: the newest that a checkpoint has. Batch n + 1 is prepared in a
    thread while step n runs; the metrics of step n - 1 are written after step n has been started. Returns the exit
    status, or GO_BACK where the run is to go back to a checkpoint because of a spike."""
    pending: _Pending | None = None

    def look(now: bool = False) -> None:
        """Write the metrics that are pending, if they are to be logged; `now`: they are needed in any case."""
        nonlocal pending
        if pending is None:
            return
        logged = pending.iteration % cfg.run.log_every == 0 or pending.iteration == cfg.run.steps
        logged |= pending.validation is not None
        if logged or now:
            numbers = {name: value.item() for name, value in pending.values.items() if name != "norms"}
            run.health.observe(pending.iteration, numbers)
            _watch_for_spikes(pending, numbers["lm_loss"], run)
            if logged:
                _write(cfg, pending, numbers, run)
        if cfg.run.norms_every and pending.iteration % cfg.run.norms_every == 0 and run.writer and run.writer.norms:
            run.writer.norms.write(pending.iteration, pending.values["norms"])
        pending = None

    iteration, began, signal, due = start, time.perf_counter(), 0, False
    last = min(cfg.run.steps, cfg.run.stop_at or cfg.run.steps)
    while iteration < last and not (signal := run.stopping()) and not run.health.verdict and not run.spikes.found:
        asked = time.perf_counter()
        with run.events.phase("data"):
            batch, consumed = run.to_device(next(run.batches)), run.batches.counts()
        waited, parts = time.perf_counter() - asked, len(batch.tokens)
        consumed["global_batch_size"] = parts * cfg.data.global_batch_size // cfg.data.microbatches
        if run.processes is not None:
            run.processes.watchdog.begin(iteration)
        run.profiler.before(iteration + 1)
        try:
            with run.watch.step(iteration + 1) if iteration > start else nullcontext():
                state, values = run.steps[parts](state, batch, run.hyper)
                look()  # which waits for the step before
        except NonFinite as error:  # the state holds old and new values: the end
            run.health.stopped_by = f"in iteration {iteration + 1} {error}"
            break
        iteration += 1
        if iteration == start + 1 and (memory := runtime.memory_text(cfg.run.device)):
            log.info("after the first step: %s", memory)
        ended = time.perf_counter()
        run.events.done(iteration)
        pending, began = _Pending(iteration, values, ended - began, waited, consumed), ended
        if run.ranks.done(iteration, pending.seconds, waited):
            began = time.perf_counter()
        if run.profiler.after(iteration):  # which takes a while to write what it has
            began = time.perf_counter()
        if run.evaluate is not None and iteration % cfg.run.eval_every == 0:
            with run.events.phase("evaluate"):
                pending = replace(pending, validation=_validated(run.evaluate, state, run))
            look()
            began = time.perf_counter()
        if run.samples is not None and iteration % cfg.run.sample_every == 0:
            look()
            with run.events.phase("evaluate"):
                texts = run.samples.write(state.params)
            for line in run.writer.samples(iteration, texts) if run.writer is not None else ():
                log.info("%s", line)
            began = time.perf_counter()
        # Behind the validation: a later process goes on after this iteration, and would not make it up.
        due |= iteration % cfg.run.checkpoint_every == 0 or iteration == cfg.run.steps
        if due:
            look(now=True)
            if run.may_save:
                run.save(cfg, iteration, state)
                saved, due = iteration, False
        elif cfg.run.local_every and iteration % cfg.run.local_every == 0:
            look(now=True)
            if run.may_save:
                run.save(cfg, iteration, state, local=True)
    look(now=True)
    if run.spikes.found and not run.verdict and not signal:
        run.store.wait()
        return GO_BACK
    # After a signal; and after a start from a local copy that had nothing more to do.
    if iteration > saved and run.may_save and not run.verdict and iteration != cfg.run.stop_at:
        run.save(cfg, iteration, state)
        saved = iteration
    with run.events.phase("save"):
        run.store.close(saved == iteration)
    return _ended(cfg, iteration, saved, signal, run)


def _watch_for_spikes(pending: _Pending, loss: float, run: Run) -> None:
    spike = run.spikes.observe(pending.iteration, loss, pending.consumed["consumed_samples"])
    if spike is not None and run.spikes.found is None:
        run.events.write("spike", iteration=spike.iteration, loss=loss, usual=spike.usual, action=run.spikes.action)


def _write(cfg: Config, pending: _Pending, numbers: dict[str, float], run: Run) -> None:
    """The first process's record of an iteration, and of the validation behind it."""
    if run.writer is None or run.display is None:
        return
    row = metrics.record(
        cfg, pending.iteration, numbers, pending.seconds, pending.waited, run.hardware, pending.consumed
    )  # fmt: skip
    losses = metrics.validation(pending.validation) if pending.validation else {}
    run.display.record(row, run.writer.write(row, losses))
    for line in metrics.validation_lines(pending.iteration, losses):
        log.info("%s", line)


def _validated(evaluate: stages.Compiled, state: train_step.TrainState, run: Run) -> dict[str, float]:
    """The loss of each source's held-out part, in nats per token."""
    return {
        name: sum(evaluate(state.params, batch).item() for batch in batches) / len(batches)
        for name, batches in run.validation.items()
    }


def _ended(cfg: Config, iteration: int, saved: int, signal: int, run: Run) -> int:
    """Say how the run ended; returns its exit status."""
    where = run.store.folder / str(saved) if saved else "none"
    why = run.verdict
    if not why and not run.health.may_save:  # every one of them was worth nothing
        why = f"the run ended in {run.health.streak} skipped iterations"
    if why:
        log.error(
            "stopped at iteration %d: %s. Later iterations would not mend it, so none is saved; the last good "
            "checkpoint is %s. Go on from it with another --optim.lr or other data (--run.accept_changes)",
            iteration, why, where,
        )  # fmt: skip
        run.events.end(health.STATUS, why)
        return health.STATUS
    if signal:
        what = f"saved iteration {iteration} in {where}" if iteration else "nothing to save yet"
        log.info("stopped: %s; the same command goes on from there", what)
        run.events.end(SAVED if saved else UNSAVED, f"{signals.Signals(signal).name}: {what}")
        return SAVED if saved else UNSAVED
    if iteration < cfg.run.steps:
        log.info("stopped behind iteration %d, as --run.stop_at says; nothing is saved", iteration)
        run.events.end(UNSAVED, f"--run.stop_at={cfg.run.stop_at}")
        return UNSAVED
    memory = runtime.memory_text(cfg.run.device)
    log.info("done: %d iterations, checkpoint %s%s", iteration, where, f"; {memory}" if memory else "")
    run.events.end(0, "all iterations are done")
    return 0
