"""The stretches of a run: from a checkpoint to the end, or to a spike, from which the run goes back to a checkpoint."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_fn import config_fields
from llama_fn.checkpoint import SavedStep, Store
from llama_fn.compiler import stages
from llama_fn.config import Config
from llama_fn.config_checks import profiled
from llama_fn.data import rampup, skips
from llama_fn.data.blend import Blend
from llama_fn.data.parts import Parts as Data
from llama_fn.data.parts import open_parts
from llama_fn.data.samples import Samples
from llama_fn.distributed import GivingUp, Processes, StepWatch, by_chief
from llama_fn.hardware import Hardware
from llama_fn.inspect.profiling import Profiler
from llama_fn.model import train_step
from llama_fn.run import compiling, health, metrics, records, resume, stopping, training
from llama_fn.run.batches import ToDevice, iterator, validation_batches
from llama_fn.run.display import Display, at_work
from llama_fn.run.events import Events
from llama_fn.run.ranks import Ranks
from llama_fn.run.spikes import WINDOW, Spikes
from llama_fn.run.text_samples import TextSamples, pieces_of
from llama_fn.signals import StopRequest
from sharding import Mesh

log = logging.getLogger("llama_fn.loop")


@dataclass(frozen=True)
class Parts:
    """What lasts as long as the run."""

    cfg: Config
    flags_text: str
    backend: compiling.Backend | None
    mesh: Mesh
    hardware: Hardware | None
    members: Processes | None
    stop: StopRequest
    store: Store
    events: Events
    give_up: GivingUp
    console: Any

    @property
    def chief(self) -> bool:
        """Whether this process writes."""
        return self.members is None or self.members.chief

    @property
    def workdir(self) -> Path:
        """The run's."""
        return Path(self.cfg.run.workdir)


def stretches(parts: Parts) -> int:
    """Train from the newest checkpoint to the end, or to a spike, from which it goes back to a checkpoint."""
    cfg, compiled = parts.cfg, _Compiled({}, None)
    spikes = Spikes(cfg.run.on_spike, cfg.run.spike_deviations)
    while True:
        with at_work(parts.console, "looking for a checkpoint"):
            newest = parts.store.find(lambda saved: resume.refuse_changes(cfg, saved), config_fields.flat(cfg))
        if spikes.found is not None:
            _go_back(parts, spikes, newest)
        passing_over = skips.with_kept(cfg, parts.workdir)
        load = lambda: _loaded(passing_over, parts.workdir, newest)  # noqa: E731, B023
        with parts.events.phase("prepare"), at_work(parts.console, "finding, tokenizing and ordering the data"):
            data, train = load() if parts.members is None else parts.members.in_turn(load)
        _, consumed, _ = resume.starting_point(newest)
        compiled = _compiled(parts, compiled, data.has_validation, consumed)
        status = _stretch(parts, passing_over, compiled, spikes, newest, data, train)
        if status != training.GO_BACK:
            return status


def _go_back(parts: Parts, spikes: Spikes, newest: SavedStep | None) -> None:
    """To `newest`, because of the spike that was found; says what is passed over from there."""
    spike, (start, consumed, _) = spikes.found, resume.starting_point(newest)
    assert spike is not None
    over = {"from": consumed, "to": spike.consumed} if spikes.action == "skip" else {}
    if over:
        by_chief(parts.members, lambda: skips.keep(parts.workdir, consumed, spike.consumed))
    spikes.went_back(start)
    facts = {"iteration": spike.iteration, "loss": spike.loss, "usual": spike.usual, "action": spikes.action}
    parts.events.write("spike", **facts, back_to=start, **over)
    what = f"samples {consumed} to {spike.consumed} are passed over" if over else "the same samples are trained again"
    log.warning("%s. The run goes back to iteration %d, and %s", spike, start, what)


def _logged(workdir: Path) -> list[tuple[int, float]]:
    """The losses so far, of which the last count."""
    return [(row["iteration"], row["lm_loss"]) for row in records.read(workdir)][-WINDOW:]


def _loaded(cfg: Config, workdir: Path, newest: SavedStep | None) -> tuple[Data, Samples | Blend]:
    """The data, and the samples that are left to train on; the first process of a machine leaves both on disk."""
    data = open_parts(cfg, workdir)
    if newest is not None:
        resume.refuse_other_data(cfg, newest, data)
    start, consumed, _ = resume.starting_point(newest)
    known = newest.meta["iterator"] if newest is not None else {}
    return data, data.train_samples(cfg, consumed, max(0, cfg.run.steps - start), known)


@dataclass(frozen=True)
class _Compiled:
    """The steps by how many microbatches a batch has, and the evaluation."""

    steps: dict[int, stages.Compiled]
    evaluate: stages.Compiled | None


def _compiled(parts: Parts, before: _Compiled, validates: bool, consumed: int) -> _Compiled:
    """What was compiled `before`, where it has the batches of all sizes from `consumed` samples on."""
    cfg, smaller = parts.cfg, list(rampup.configs(parts.cfg, consumed))
    if before.steps and all(each.data.microbatches in before.steps for each in smaller):
        return before
    if parts.chief:
        resume.save_flags(parts.workdir, cfg, parts.flags_text)
    with parts.events.phase("compile"), at_work(parts.console, f"compiling with {cfg.run.backend}"):
        made = compiling.compile(cfg, parts.mesh, parts.hardware, parts.members, validates, parts.backend, smaller)
        if parts.members is not None:
            parts.members.all_reached("compiled")
    return _Compiled(*made)


def _stretch(
    parts: Parts, passing_over: Config, compiled: _Compiled, spikes: Spikes, newest: SavedStep | None, data: Data,
    train: Samples | Blend,
) -> int:  # fmt: skip
    """From a checkpoint, or from the beginning, as far as it goes; `passing_over`: the config with all that is
    skipped."""
    cfg, members, workdir, events, store = parts.cfg, parts.members, parts.workdir, parts.events, parts.store
    if newest is not None:
        resume.warn_of_other_digits(cfg, parts.mesh, newest)
    start, consumed, tokens = resume.starting_point(newest)
    pieces = pieces_of(cfg, workdir) if cfg.run.sample_every else None
    step = compiled.steps[cfg.data.microbatches]
    what = "drawing the first parameters" if newest is None else f"restoring iteration {start}"
    with events.phase("restore"), at_work(parts.console, what):
        state = resume.restore_or_begin(cfg, store, newest, step.lowered)
    to_device = ToDevice(cfg, step, members)
    stopping.say_how_long_a_save_takes(cfg, workdir, store.bytes(step.lowered.inputs), parts.chief)
    with ExitStack() as held:
        skipped = skips.ranges(passing_over.data.skip)
        batches = iterator(cfg, train, to_device, consumed, tokens, skipped, rampup.of(cfg.data))
        held.callback(batches.close)
        validation = validation_batches(cfg, data.valid_samples(cfg), to_device)
        display = Display(cfg.run.steps, start, parts.console) if parts.chief else None
        if (window := profiled(cfg)) and window.stop - 1 <= start:
            log.warning("--run.profile_steps=%s lies before iteration %d, from which this run goes on: nothing is "
                        "profiled", cfg.run.profile_steps, start)  # fmt: skip
        writer = metrics.Writer(cfg, workdir, start) if parts.chief else None
        profiler = Profiler(cfg, 0 if members is None else members.rank, step, parts.hardware)
        watch = StepWatch(cfg.run.step_limit_s, parts.give_up)
        ranks = Ranks(members, cfg.run.device, cfg.run.ranks_every, workdir if parts.chief else None, start)
        for part in (writer, display, profiler, watch, ranks):
            if part is not None:
                held.callback(part.close)
        held.callback(store.wait)
        samples = None
        if pieces is not None:
            samples = TextSamples(cfg, pieces, step.lowered, compiling.decoding_options(cfg, members))
        hyper = train_step.hyperparameters(cfg, cfg.run.device)
        monitor = health.Health(cfg.run.stop_after_skipped, cfg.model.compute_dtype == "fp16", start)
        run = training.Run(
            compiled.steps, compiled.evaluate, hyper, to_device, batches, validation, data, store, writer, display,
            parts.stop, parts.hardware, members, profiler, monitor, spikes, parts.mesh, samples, events, watch, ranks,
        )  # fmt: skip
        if display:
            display.start()
        parts.stop.train()
        saved = store.newest if newest is not None and newest.local else start
        events.write("training", iteration=start, steps=cfg.run.steps, restored=newest is not None)
        events.iteration = start
        spikes.begin(start, by_chief(members, lambda: _logged(workdir) if start else []))
        with events.phase("step"):
            status = training.train(cfg, start, saved, state, run)
        if members is not None:
            members.barrier()
        return status
