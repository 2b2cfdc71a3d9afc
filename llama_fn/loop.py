"""The imperative part of a run, read top to bottom: prepare, compile, restore or begin, then step, log, save."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_fn import arrays, config, metrics, random, runtime, stages, train_step, tree
from llama_fn.backends.inductor import default_cache
from llama_fn.checkpoint import Checkpointer
from llama_fn.config import Config
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.prepare import datasets
from llama_fn.data.samples import Samples
from llama_fn.display import Display
from llama_fn.errors import UserError
from llama_fn.files import atomic
from llama_fn.hardware import Hardware
from sharding import Mesh

log = logging.getLogger("llama_fn.loop")


@dataclass(frozen=True)
class Parts:
    """What a run is made of, once everything is prepared."""

    step: stages.Compiled
    evaluate: stages.Compiled | None
    batches: BatchIterator
    validation: list[train_step.Batch]
    checkpointer: Checkpointer
    writer: metrics.Writer
    display: Display
    stop: runtime.StopRequest
    hardware: Hardware | None


def run(cfg: Config, flags_text: str = "") -> int:
    """Train as cfg says, resuming what the work folder holds. Returns the exit status: 0, or 130 after Ctrl-C."""
    cfg = config.validate(cfg)
    mesh = _mesh(cfg)
    workdir = Path(cfg.run.workdir)
    _make_writable(workdir)
    hardware = runtime.setup(cfg.run)
    runtime.log_to_terminal(None)
    stop = runtime.StopRequest().install()
    try:
        checkpointer = Checkpointer(workdir / "checkpoints", cfg.run.keep_latest, cfg.run.keep_every)
        _refuse_changes(cfg, checkpointer)
        _save_flags(workdir, cfg, flags_text)
        train_data, valid_data = datasets(cfg, workdir)
        step, evaluate = _compile(cfg, mesh, valid_data is not None)
        start, state, consumed = _restore_or_begin(cfg, checkpointer)
        batches = _iterator(cfg, train_data, consumed)
        validation = _validation_batches(cfg, valid_data)
        display = Display(cfg.run.steps, start)
        runtime.log_to_terminal(display.console)
        writer = metrics.Writer(cfg, workdir, start)
        display.start()
        parts = Parts(step, evaluate, batches, validation, checkpointer, writer, display, stop, hardware)
        try:
            return _train(cfg, start, state, parts)
        finally:
            checkpointer.settle()
            display.stop()
            writer.close()
            batches.close()
    finally:
        stop.remove()


def _train(cfg: Config, start: int, state: train_step.TrainState, parts: Parts) -> int:
    """The loop. Batch n + 1 is prepared in a thread while step n runs; the metrics of step n - 1 are written after
    step n has been started, so that a device never waits for a log line."""
    pending: tuple[int, dict[str, torch.Tensor], float] | None = None

    def write_pending() -> None:
        if pending is not None:
            iteration, values, seconds = pending
            if iteration % cfg.run.log_every == 0 or iteration == cfg.run.steps:
                numbers = {name: value.item() for name, value in values.items()}
                row = metrics.record(cfg, iteration, numbers, seconds, parts.hardware)
                parts.display.record(row, parts.writer.write(row))

    iteration, began = start, time.perf_counter()
    while iteration < cfg.run.steps and not parts.stop.signal:
        batch = _to_device(next(parts.batches), cfg)
        state, values = parts.step(state, batch)
        iteration += 1
        write_pending()
        ended = time.perf_counter()
        pending, began = (iteration, values, ended - began), ended
        if iteration % cfg.run.checkpoint_every == 0 or iteration == cfg.run.steps:
            write_pending()
            pending = None
            parts.checkpointer.save(iteration, state, _meta(cfg, parts.batches))
        if parts.evaluate is not None and iteration % cfg.run.eval_every == 0:
            losses = [parts.evaluate(state.params, b).item() for b in parts.validation]
            log.info("%s", parts.writer.validation(iteration, sum(losses) / len(losses)))
            began = time.perf_counter()
    write_pending()
    if parts.stop.signal and iteration > start and iteration not in parts.checkpointer.steps():
        parts.checkpointer.save(iteration, state, _meta(cfg, parts.batches))
    parts.checkpointer.close()
    where = parts.checkpointer.folder / str(iteration)
    if parts.stop.signal:
        saved = f"saved iteration {iteration} in {where}" if iteration else "nothing to save yet"
        log.info("stopped: %s; the same command goes on from there", saved)
        return parts.stop.exit_code
    log.info("done: %d iterations, checkpoint %s", iteration, where)
    return 0


def _mesh(cfg: Config) -> Mesh:
    try:
        return Mesh.parse(cfg.mesh.axes)
    except ValueError as error:
        raise UserError(f"--mesh.axes={cfg.mesh.axes}: {error}") from None


def _make_writable(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--run.workdir={workdir} cannot be written: {error.strerror}; name another folder") from None


def _meta(cfg: Config, batches: BatchIterator) -> dict[str, Any]:
    return {"iterator": batches.state(), "config": config.flat(cfg)}


def _refuse_changes(cfg: Config, checkpointer: Checkpointer) -> None:
    """UserError when the checkpoints were made with flags that give other numbers."""
    for at in reversed(checkpointer.steps()):
        try:
            saved = checkpointer.meta(at)["config"]
        except Exception:  # damaged: restoring will say so and go one back
            continue
        changed = {
            name: (saved.get(name), value)
            for name, value in config.flat(cfg, numbers_only=True).items()
            if saved.get(name) != value
        }
        if changed and not cfg.run.accept_changes:
            lines = [f"  --{name}: was {was!r}, now {now!r}" for name, (was, now) in changed.items()]
            raise UserError(
                f"{checkpointer.folder} holds iteration {at} of a run with other flags:\n" + "\n".join(lines) + "\n"
                "Going on would give other numbers. Restore the flags, name another --run.workdir, or accept the "
                "change with --run.accept_changes"
            )
        return


def _save_flags(workdir: Path, cfg: Config, flags_text: str) -> None:
    with atomic(workdir / "config.json") as f:
        json.dump(config.flat(cfg), f, indent=1)
    with atomic(workdir / "flags.txt") as f:
        f.write(flags_text)


def _compile(cfg: Config, mesh: Mesh, with_eval: bool) -> tuple[stages.Compiled, stages.Compiled | None]:
    """Trace, lower and compile the step, and the validation step if there is one, before a single weight exists."""
    state, batch = train_step.abstract_state(cfg), train_step.abstract_batch(cfg)
    log.info(
        "model: %s, %d parameters, %.1f MB of state",
        cfg.model.preset, arrays.total_size(state.params), arrays.total_bytes(state) / 1e6,
    )  # fmt: skip
    options: dict[str, Any] = {}
    if cfg.run.backend == "inductor":
        cache = Path(cfg.run.compile_cache) if cfg.run.compile_cache else default_cache()
        options = {"device": cfg.run.device, "attention": cfg.run.attention, "cache": cache}

    def climb(wrapped: stages.Wrapped, *args: Any) -> stages.Compiled:
        traced = wrapped.trace(*args)
        lowered = traced.lower(mesh, cfg.mesh.rules)
        memory, cost = lowered.memory_analysis(), lowered.cost_analysis()
        log.info(
            "%s: traced in %.1f s, %.1f GFLOP, peak memory without fusion %.0f MB; compiling with %s",
            traced.name, traced.seconds, cost.total_flops / 1e9, memory.peak_bytes / 1e6, cfg.run.backend,
        )  # fmt: skip
        compiled = lowered.compile(cfg.run.backend, **options)
        log.info("%s: %s in %.1f s", traced.name, "loaded" if compiled.from_cache else "compiled", compiled.seconds)
        return compiled

    train_fn, eval_fn = train_step.make_train_step(cfg), train_step.make_eval_step(cfg)
    train = climb(stages.jit(train_fn, donate=0), state, batch)
    return train, climb(stages.jit(eval_fn), state.params, batch) if with_eval else None


def _restore_or_begin(cfg: Config, checkpointer: Checkpointer) -> tuple[int, Any, int]:
    """(iteration, state, samples consumed)."""
    abstract = train_step.abstract_state(cfg)
    restored = checkpointer.restore_latest(abstract, cfg.run.device)
    if restored is None:
        log.info("beginning at iteration 0 with seed %d", cfg.run.seed)
        return 0, arrays.materialize(abstract, random.key(cfg.run.seed), cfg.run.device), 0
    iteration, state, meta = restored
    log.info("resuming from iteration %d of %s", iteration, checkpointer.folder)
    return iteration, state, meta["iterator"]["consumed_samples"]


def _iterator(cfg: Config, samples: Samples, consumed: int) -> BatchIterator:
    return BatchIterator(samples, cfg.data.global_batch_size, cfg.data.microbatches, cfg.model.vocab_size, consumed)


def _validation_batches(cfg: Config, samples: Samples | None) -> list[train_step.Batch]:
    if samples is None:
        return []
    batches = _iterator(cfg, samples, 0)
    held = [_to_device(next(batches), cfg) for _ in range(cfg.run.eval_batches)]
    batches.close()
    return held


def _to_device(batch: train_step.Batch, cfg: Config) -> train_step.Batch:
    return tree.map(lambda x: x.to(cfg.run.device, non_blocking=True), batch)
