"""What a run needs before its first step: mesh, folder, compiled steps, state and data."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_fn import arrays, ascend, config, dump, passes, plan, random, report, rungs, stages, train_step, tree
from llama_fn.backends import code_cache
from llama_fn.checkpoint import Checkpointer
from llama_fn.config import Config
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.samples import Samples
from llama_fn.errors import UserError
from llama_fn.files import atomic
from llama_fn.hardware import Hardware, named
from llama_fn.processes import Processes
from llama_fn.store import Store
from sharding import Mesh, P

log = logging.getLogger("llama_fn.prepare")
Backend = Callable[..., stages.backends.Executable]


def refuse_lonely(cfg: Config, mesh: Mesh, processes: Processes | None) -> None:
    """UserError, before anything takes time, for a mesh of several devices in one process that cannot have them."""
    if mesh.size > 1 and processes is None and cfg.run.backend != "interpret":
        raise UserError(stages.backends.lonely(mesh, cfg.run.backend))
    if processes is not None and cfg.run.backend == "interpret":
        raise UserError("--run.backend=interpret simulates the whole mesh in one process: start it without torchrun")


def make_writable(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"--run.workdir={workdir} cannot be written: {error.strerror}; name another folder") from None


def refuse_changes(cfg: Config, checkpointer: Checkpointer) -> None:
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


def save_flags(workdir: Path, cfg: Config, flags_text: str) -> None:
    with atomic(workdir / "config.json") as f:
        json.dump(config.flat(cfg), f, indent=1)
    with atomic(workdir / "flags.txt") as f:
        f.write(flags_text)


def backend_options(cfg: Config, processes: Processes | None) -> dict[str, Any]:
    """The keyword arguments of cfg's backend."""
    options: dict[str, Any] = {} if processes is None else {"processes": processes}
    if cfg.run.backend == "inductor":
        cache = Path(cfg.run.compile_cache) if cfg.run.compile_cache else code_cache.default()
        options |= {"device": cfg.run.device, "attention": cfg.run.attention, "cache": code_cache.usable(cache)}
        options |= {"profiled": True} if config.profiled(cfg) else {}
    if cfg.run.backend == "npu":
        options |= {"device": cfg.run.device}
    return options


def dump_folder(cfg: Config, processes: Processes | None) -> Path | None:
    """Where this process dumps its graphs, None where it does not."""
    rank = 0 if processes is None else processes.rank
    wanted = cfg.run.dump_dir and ascend.dumps(cfg.run, rank)
    return dump.rank_folder(Path(cfg.run.dump_dir), rank) if wanted else None


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
        memory, cost = lowered.memory_analysis(), lowered.cost_analysis()
        log.info(
            "%s: traced in %.1f s, %.1f GFLOP, peak memory without fusion %.0f MB; compiling with %s",
            traced.name, traced.seconds, cost.total_flops / 1e9, memory.peak_bytes / 1e6, cfg.run.backend,
        )  # fmt: skip
        if cfg.run.backend == "npu" and backend is None:
            options["dump_to"] = folder
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


def restore_or_begin(cfg: Config, store: Store) -> tuple[int, Any, int]:
    """(iteration, state, samples consumed)."""
    restored = store.restore_latest()
    if restored is None:
        log.info("beginning at iteration 0 with seed %d", cfg.run.seed)
        return 0, arrays.materialize(store.infos, random.key(cfg.run.seed), cfg.run.device, store.parts()), 0
    iteration, state, meta = restored
    log.info("resuming from iteration %d of %s", iteration, store.folder)
    return iteration, state, meta["iterator"]["consumed_samples"]


def iterator(cfg: Config, samples: Samples, consumed: int, place: Place) -> BatchIterator:
    d = cfg.data
    return BatchIterator(samples, d.global_batch_size, d.microbatches, cfg.model.vocab_size, consumed, place.rows)


def validation_batches(cfg: Config, samples: Samples | None, place: Place) -> list[train_step.Batch]:
    if samples is None:
        return []
    batches = iterator(cfg, samples, 0, place)
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
