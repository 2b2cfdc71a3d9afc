"""What a run needs before its first step: mesh, folder, compiled steps, state and data."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_fn import tree
from llama_fn.compiler import passes, stages
from llama_fn.compiler.backends import code_cache, inductor
from llama_fn.config import Config
from llama_fn.config_checks import dump_ranks, dumps, profiled, without_effect
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.prepare import check as check_data
from llama_fn.data.samples import Samples
from llama_fn.distributed.processes import Processes
from llama_fn.errors import FULL_DISK, UserError
from llama_fn.hardware import Hardware, named
from llama_fn.inspect import dump
from llama_fn.model import arrays, train_step
from llama_fn.planner import plan, report, rungs
from llama_fn.run.resume import refuse_too_large
from sharding import Mesh, P

log = logging.getLogger("llama_fn.prepare")
Backend = Callable[..., stages.backends.Executable]


def refuse_lonely(cfg: Config, mesh: Mesh, world: int) -> None:
    """UserError, before anything takes time, for a mesh of several devices in one process that cannot have them."""
    if mesh.size > 1 and world == 1 and cfg.run.backend != "interpret":
        raise UserError(stages.backends.lonely(mesh, cfg.run.backend))
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
    if not cfg.run.compile_only:
        check_data(cfg)


def make_writable(workdir: Path, flag: str = "run.workdir") -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UserError(f"--{flag}={workdir} cannot be written: {error.strerror}; name another folder") from None


def backend_options(cfg: Config, processes: Processes | None) -> dict[str, Any]:
    """The keyword arguments of cfg's backend."""
    options: dict[str, Any] = {} if processes is None else {"processes": processes}
    if cfg.run.backend == "inductor":
        cache = Path(cfg.run.compile_cache) if cfg.run.compile_cache else code_cache.default()
        options |= {"device": cfg.run.device, "attention": cfg.run.attention, "cache": code_cache.usable(cache)}
        options |= {"profiled": True} if profiled(cfg) else {}
    if cfg.run.backend == "npu":
        options |= {"device": cfg.run.device}
    return options


def dump_folder(cfg: Config, processes: Processes | None) -> Path | None:
    """Where this process dumps its graphs, None where it does not."""
    rank = 0 if processes is None else processes.rank
    return dump.rank_folder(Path(cfg.run.dump_dir), rank) if dumps(cfg.run, rank) else None


def compile(
    cfg: Config, mesh: Mesh, processes: Processes | None, with_eval: bool, backend: Backend | None = None
) -> tuple[stages.Compiled, stages.Compiled | None]:
    """Trace, lower and compile the step, and the validation step if there is one, before a single weight exists.

    `backend`: what compiles instead of the one that cfg names.
    """
    state = train_step.abstract_state(cfg)
    log.info(
        "model: %s, %d parameters, %.1f MB of state",
        cfg.model.preset, arrays.total_size(state.params), arrays.total_bytes(state) / 1e6,
    )  # fmt: skip
    options = backend_options(cfg, processes) if backend is None else {}

    def climb(traced: stages.Traced, folder: Path | None) -> stages.Compiled:
        record, lowered = _lowered(traced, cfg, mesh, folder)
        refuse_too_large(cfg, lowered)
        memory, cost = lowered.memory_analysis(), lowered.cost_analysis()
        log.info(
            "%s: traced in %.1f s, %.1f GFLOP, peak memory without fusion %.0f MB; compiling with %s",
            traced.name, traced.seconds, cost.total_flops / 1e9, memory.peak_bytes / 1e6, cfg.run.backend,
        )  # fmt: skip
        if cfg.run.backend == "npu" and backend is None:
            options["write"] = functools.partial(dump.write_ge, folder) if folder else None
        compiled = lowered.compile(backend or cfg.run.backend, **options)
        if record:
            record.finish(lowered, compiled)
        log.info("%s: %s in %.1f s", traced.name, "loaded" if compiled.from_cache else "compiled", compiled.seconds)
        return compiled

    folder = dump_folder(cfg, processes)
    train = climb(rungs.train(cfg), folder)
    if not with_eval:
        return train, None
    options.pop("profiled", None)
    return train, climb(rungs.evaluation(cfg), folder / dump.EVALUATION if folder else None)


def _lowered(
    traced: stages.Traced, cfg: Config, mesh: Mesh, folder: Path | None
) -> tuple[dump.Record | None, stages.Lowered]:
    """The lowered step, and the record of its stages in `folder`, to be finished once it is compiled."""
    record = dump.Record(folder) if folder else None
    return record, rungs.lower(traced, cfg, mesh, record.watch(traced) if record else passes.unwatched)


def compile_only(cfg: Config, mesh: Mesh, hardware: Hardware | None) -> None:
    """Say what a step takes and needs on `hardware` (None: Ascend 910B1 for backend npu, else this CPU, measured), dump
    the graphs of one device where that is asked for, and compile where it can be done without other processes."""
    name = "ascend_910b1" if cfg.run.backend == "npu" else "cpu"
    found = plan.make(cfg, mesh, hardware or named(name, cfg.model.compute_dtype))
    log.info("%s", report.as_text(found))
    if mesh.size == 1 and cfg.run.backend != "npu":
        compile(cfg, mesh, None, bool(cfg.run.eval_every))
        return
    log.info("not compiled: that takes %d processes, each with its device", mesh.size)
    folder = dump_folder(cfg, None)
    if folder:
        record, lowered = _lowered(rungs.train(cfg), cfg, mesh, folder)
        assert record is not None
        record.finish(lowered)


def iterator(cfg: Config, samples: Samples, place: Place, consumed: int = 0, tokens: int = 0) -> BatchIterator:
    d = cfg.data
    shape = (d.global_batch_size, d.microbatches, cfg.model.vocab_size)
    return BatchIterator(samples, *shape, consumed, tokens, place.rows)


def validation_batches(cfg: Config, samples: Samples | None, place: Place) -> list[train_step.Batch]:
    if samples is None:
        return []
    batches = iterator(cfg, samples, place)
    held = [place(next(batches)) for _ in range(cfg.run.eval_batches)]
    batches.close()
    return held


class Place:
    """Brings this process's rows of a global batch onto its device, cut where further dimensions are sharded."""

    def __init__(self, cfg: Config, step: stages.Compiled, processes: Processes | None) -> None:
        self.device, self.processes, self.rows = cfg.run.device, processes, slice(None)
        leaves = tree.leaves(train_step.abstract_batch(cfg))
        layouts = step.lowered.inputs[-len(leaves) :]
        if processes is not None:
            self.rows = processes.parts(leaves, layouts)[0].at[1]
        self.layouts = [P.of(axes if dim != 1 else () for dim, axes in enumerate(p.by_dim)) for p in layouts]

    def __call__(self, batch: train_step.Batch) -> train_step.Batch:
        if self.processes is not None:
            batch = self.processes.local(batch, self.layouts)
        return tree.map(lambda x: x.to(self.device, non_blocking=True), batch)
