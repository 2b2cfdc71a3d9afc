"""The imperative part of a run, read top to bottom: prepare, compile, restore or begin, then step, log, save."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_fn import config, metrics, prepare, processes, rungs, runtime, stages, train_step
from llama_fn.config import Config
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.prepare import datasets
from llama_fn.display import Display
from llama_fn.hardware import Hardware
from llama_fn.processes import Processes
from llama_fn.profiling import Profiler
from llama_fn.store import Store

log = logging.getLogger("llama_fn.loop")


@dataclass(frozen=True)
class Parts:
    """What a run is made of, once everything is prepared; only the first process of several writes and displays."""

    step: stages.Compiled
    evaluate: stages.Compiled | None
    place: prepare.Place
    batches: BatchIterator
    validation: list[train_step.Batch]
    store: Store
    writer: metrics.Writer | None
    display: Display | None
    stop: runtime.StopRequest
    hardware: Hardware | None
    processes: Processes | None
    profiler: Profiler

    def stopping(self) -> int:
        """The signal that asks to stop; that of any process, so that all stop after the same step."""
        return self.stop.signal if self.processes is None else self.processes.any(self.stop.signal)


def run(cfg: Config, flags_text: str = "", backend: prepare.Backend | None = None) -> int:
    """Train as cfg says, resuming what the work folder holds. Returns the exit status: 0, or 130 after Ctrl-C.

    `backend`: what compiles the steps instead of the one that cfg names.
    """
    cfg = config.validate(cfg)
    mesh = rungs.mesh(cfg)
    runtime.log_to_terminal(None, quiet=os.environ.get("RANK", "0") != "0")
    hardware = runtime.setup(cfg.run)
    if cfg.run.compile_only:
        prepare.compile_only(cfg, mesh, hardware)
        return 0
    members = processes.start(mesh, cfg.run.device, cfg.run.timeout_s)
    prepare.refuse_lonely(cfg, mesh, members)
    chief = members is None or members.chief
    workdir = Path(cfg.run.workdir)
    prepare.make_writable(workdir)
    stop = runtime.StopRequest().install()
    try:
        store = Store(cfg, workdir / "checkpoints", members)
        if store.checkpointer is not None:
            prepare.refuse_changes(cfg, store.checkpointer)
            prepare.save_flags(workdir, cfg, flags_text)
        load = lambda: datasets(cfg, workdir)  # noqa: E731
        train_data, valid_data = load() if members is None else members.in_turn(load)
        step, evaluate = prepare.compile(cfg, mesh, members, valid_data is not None, backend)
        start, state, consumed = prepare.restore_or_begin(cfg, store.laid_out(step.lowered.inputs))
        place = prepare.Place(cfg, step, members)
        batches = prepare.iterator(cfg, train_data, consumed, place)
        validation = prepare.validation_batches(cfg, valid_data, place)
        display = Display(cfg.run.steps, start) if chief else None
        runtime.log_to_terminal(display.console if display else None, quiet=not chief)
        writer = metrics.Writer(cfg, workdir, start) if chief else None
        profiler = Profiler(cfg, 0 if members is None else members.rank, step, hardware)
        parts = Parts(
            step, evaluate, place, batches, validation, store, writer, display, stop, hardware, members, profiler
        )
        try:
            if display:
                display.start()
            status = _train(cfg, start, state, parts)
            if members is not None:
                members.barrier()
            return status
        finally:
            store.settle()
            for part in (profiler, display, writer, batches):
                if part is not None:
                    part.close()
    finally:
        stop.remove()
        if members is not None:
            members.close()


def _train(cfg: Config, start: int, state: train_step.TrainState, parts: Parts) -> int:
    """The loop. Batch n + 1 is prepared in a thread while step n runs; the metrics of step n - 1 are written after
    step n has been started, so that a device never waits for a log line."""
    pending: tuple[int, dict[str, torch.Tensor], float] | None = None

    def write_pending() -> None:
        if pending is not None and parts.writer is not None and parts.display is not None:
            iteration, values, seconds = pending
            if iteration % cfg.run.log_every == 0 or iteration == cfg.run.steps:
                numbers = {name: value.item() for name, value in values.items()}
                row = metrics.record(cfg, iteration, numbers, seconds, parts.hardware)
                parts.display.record(row, parts.writer.write(row))

    iteration, began, signal, saved = start, time.perf_counter(), 0, start
    while iteration < cfg.run.steps and not (signal := parts.stopping()):
        batch = parts.place(next(parts.batches))
        if parts.processes is not None:
            parts.processes.watch.begin(iteration)
        parts.profiler.before(iteration + 1)
        state, values = parts.step(state, batch)
        iteration += 1
        write_pending()
        if iteration == start + 1 and (memory := runtime.memory_text(cfg.run.device)):
            log.info("after the first step: %s", memory)
        ended = time.perf_counter()
        pending, began = (iteration, values, ended - began), ended
        if parts.profiler.after(iteration):  # which takes a while to write what it has
            began = time.perf_counter()
        if iteration % cfg.run.checkpoint_every == 0 or iteration == cfg.run.steps:
            write_pending()
            pending, saved = None, iteration
            parts.store.save(iteration, state, _meta(cfg, parts.batches))
        if parts.evaluate is not None and iteration % cfg.run.eval_every == 0:
            losses = [parts.evaluate(state.params, b).item() for b in parts.validation]
            if parts.writer is not None:
                log.info("%s", parts.writer.validation(iteration, sum(losses) / len(losses)))
            began = time.perf_counter()
    write_pending()
    if signal and iteration > saved:
        parts.store.save(iteration, state, _meta(cfg, parts.batches))
    parts.store.close()
    where = parts.store.folder / str(iteration)
    if signal:
        what = f"saved iteration {iteration} in {where}" if iteration else "nothing to save yet"
        log.info("stopped: %s; the same command goes on from there", what)
        return runtime.exit_code(signal)
    memory = runtime.memory_text(cfg.run.device)
    log.info("done: %d iterations, checkpoint %s%s", iteration, where, f"; {memory}" if memory else "")
    return 0


def _meta(cfg: Config, batches: BatchIterator) -> dict[str, Any]:
    return {"iterator": batches.state(), "config": config.flat(cfg)}
