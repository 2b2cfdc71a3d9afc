"""The compiled steps of a run, its plan where only that is asked for, and the dump of both on the way."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_fn import compat, progress
from llama_fn.compiler import backends, kept, passes, stages
from llama_fn.compiler.backends import code_cache
from llama_fn.compiler.backends.ge_choice import choose
from llama_fn.compiler.backends.ge_counts import counted
from llama_fn.compiler.lints import lints
from llama_fn.config import Config
from llama_fn.config_checks import changed, dumps, profiled
from llama_fn.distributed import Processes
from llama_fn.errors import UserError
from llama_fn.hardware import Hardware, named
from llama_fn.inspect import dump
from llama_fn.model import arrays, train_step
from llama_fn.planner import config_stages, ge_budget, plan, report
from llama_fn.run import kept_steps, versions
from llama_fn.run.ahead import Step, compiled_ahead
from llama_fn.run.resume import refuse_too_large
from sharding import Mesh

log, lints_log = logging.getLogger("llama_fn.compiling"), logging.getLogger("llama_fn.lints")
Backend = Callable[..., backends.Executable]
TRACED, LOWERED = 0.1, 0.15  # of the time that a cold start of llama_60m compiles
TRAIN, EVALUATE = "train", "evaluate"
STEPS: Mapping[str, tuple[Callable[[Config], stages.Traced], Callable[[Config], tuple[Any, ...]]]] = {
    TRAIN: (config_stages.train, train_step.abstract_arguments),
    EVALUATE: (config_stages.evaluation, config_stages.evaluation_arguments),
}


def backend_options(cfg: Config, processes: Processes | None) -> dict[str, Any]:
    """The keyword arguments of cfg's backend."""
    options: dict[str, Any] = {} if processes is None else {"processes": processes}
    if cfg.run.backend == "inductor":
        options |= {"device": cfg.run.device, "attention": cfg.run.attention, "cache": cache_folder(cfg)}
        options |= {"profiled": True} if profiled(cfg) else {}
    if cfg.run.backend == "eager" and processes is not None:
        options |= {"device": cfg.run.device}
    if cfg.run.check_finite:
        options |= {"check_finite": True}
    if cfg.run.backend == "npu":
        options |= {"device": cfg.run.device, "form": cfg.run.npu_form, "streams": cfg.run.npu_streams}
        options |= {"cache": cache_folder(cfg) / "ge"} if cfg.run.npu_cache else {}
    return options


def decoding_options(cfg: Config, processes: Processes | None) -> dict[str, Any]:
    """Those for steps that generate: their code is not profiled, and theirs is one form of attention."""
    options = backend_options(cfg, processes)
    return {name: value for name, value in options.items() if name in ("processes", "device", "cache")}


def cache_folder(cfg: Config) -> Path:
    """Where compiled code is kept."""
    return code_cache.usable(Path(cfg.run.compile_cache) if cfg.run.compile_cache else code_cache.default())


def dump_folder(cfg: Config, processes: Processes | None) -> Path | None:
    """Where this process dumps its graphs, None where it does not."""
    rank = 0 if processes is None else processes.rank
    return dump.rank_folder(Path(cfg.run.dump_dir), rank) if dumps(cfg.run, rank) else None


@dataclass(frozen=True)
class _Steps:
    """Makes compiled steps, or takes up those of an earlier start. `peaks`: whose a dump's overlay of times takes;
    `cache`: the folder of steps that are kept whole, None where they are not."""

    cfg: Config
    mesh: Mesh
    processes: Processes | None
    backend: Backend | None
    peaks: Hardware | None
    cache: Path | None
    compilers: int = 0  # that run at a time, 0: one for each core

    def left_to_others(self, wanted: Sequence[Step]) -> list[Step]:
        """What other processes may compile meanwhile, of what is not there: all but the first, which is begun here."""
        if self.cache is None or self.processes is not None:
            return []
        return [s for s in wanted if not kept.is_there(self.cache, kept_steps.key(s.cfg, s.which, None))][1:]

    def made(self, which: str, each: Config, folder: Path | None) -> stages.Compiled:
        """A step of `each`, one of STEPS; its graphs go into `folder`, if any."""
        if self.cache is None:
            compiled = self._compiled(which, each, folder)
        else:
            key, (trace, arguments) = kept_steps.key(each, which, self.processes), STEPS[which]
            rules = config_stages.rules(each, self.mesh)
            again = lambda: config_stages.lower(trace(each), each, self.mesh)  # noqa: E731
            asked = kept.Asked(key, arguments(each), self.mesh, rules, self.processes, self.cfg.run.device, again)
            compiled = kept_steps.taken_up(self.cache, asked, lambda: self._compiled(which, each, folder))
        refuse_too_large(self.cfg, compiled.lowered)  # one that was taken up; others are asked before they compile
        log.info("%s", which_code(compiled))
        return compiled

    def _compiled(self, which: str, each: Config, folder: Path | None) -> stages.Compiled:
        """Traced, lowered and compiled."""
        cfg, on_npu = self.cfg, self.cfg.run.backend == "npu" and self.backend is None
        with progress.span(0.0, TRACED, "tracing"):
            traced = STEPS[which][0](each)
        with progress.span(TRACED, LOWERED, "lowering"):
            writer, lowered = _lowered(traced, cfg, self.mesh, self.peaks, folder)
        lowered = lowered if self.processes is None else lowered.of_rank(self.processes.rank)
        refuse_too_large(cfg, lowered)
        memory, cost = lowered.memory_analysis(), lowered.cost_analysis()
        log.info(
            "%s: traced in %.1f s, %.1f GFLOP, peak memory without fusion %.0f MB; compiling with %s",
            traced.name, traced.seconds, cost.total_flops / 1e9, memory.peak_bytes / 1e6, cfg.run.backend,
        )  # fmt: skip
        options = backend_options(cfg, self.processes) if self.backend is None else {}
        if which == EVALUATE:
            options.pop("profiled", None)
        if self.compilers:
            options["compilers"] = self.compilers
        if on_npu:
            options["write"] = functools.partial(dump.write_ge, folder) if folder else None
        with progress.span(LOWERED, 1.0, "generating code"):
            _say_lints(cfg, lowered)
            compiled = lowered.compile(self.backend or cfg.run.backend, **options)
        if writer:
            form = choose(counted(lowered.graph_module), cfg.run.npu_form) if on_npu else None
            writer.finish(lowered, compiled, form)
        return compiled


def compile(
    cfg: Config,
    mesh: Mesh,
    hardware: Hardware | None,
    processes: Processes | None,
    with_eval: bool,
    backend: Backend | None = None,
    smaller: Iterable[Config] = (),
) -> tuple[dict[int, stages.Compiled], stages.Compiled | None]:
    """Trace, lower and compile the step, and the validation step if there is one, before a single weight exists; or
    load what an earlier start compiled. Returns the steps by how many microbatches they take: that of cfg, and those of
    the `smaller` batches.

    `hardware`: whose peaks a dump's overlay of times takes; None: this CPU, measured, unless cfg's device is another.
    `backend`: what compiles instead of the one that cfg names.
    """
    state = train_step.abstract_state(cfg)
    log.info(
        "model: %s, %d parameters, %.1f MB of state",
        cfg.model.preset, arrays.total_size(state.params), arrays.total_bytes(state) / 1e6,
    )  # fmt: skip
    folder = dump_folder(cfg, processes)
    peaks = hardware or (named("cpu", cfg.model.compute_dtype) if folder and cfg.run.device == "cpu" else None)
    keeps = backend is None and kept_steps.are_kept(cfg, mesh, folder is not None)
    cache = code_cache.of_inductor(cache_folder(cfg)) if keeps else None
    steps = _Steps(cfg, mesh, processes, backend, peaks, cache)
    train, listed = {}, [cfg, *smaller]
    total = len(listed) + with_eval
    wanted = [*(Step(TRAIN, each) for each in listed), *([Step(EVALUATE, cfg)] if with_eval else [])]
    with compiled_ahead(steps.left_to_others(wanted), compat.physical_cores() - 1) as finish:
        for i, each in enumerate(listed):
            if each is not cfg:
                log.info("for batches of %d samples:", each.data.global_batch_size)
            with progress.span(i / total, (i + 1) / total, "the step"):
                finish(Step(TRAIN, each))
                train[each.data.microbatches] = steps.made(TRAIN, each, folder if each is cfg else None)
        if not with_eval:
            return train, None
        with progress.span(1 - 1 / total, 1.0, "the evaluation"):
            finish(Step(EVALUATE, cfg))
            return train, steps.made(EVALUATE, cfg, folder / dump.EVALUATION if folder else None)


def compile_one(which: str, cfg: Config, mesh: Mesh) -> None:
    """Compile one of STEPS and keep it, for a start in another process."""
    cache = code_cache.of_inductor(cache_folder(cfg))
    _Steps(cfg, mesh, None, None, None, cache, compilers=1).made(which, cfg, None)


def which_code(compiled: stages.Compiled) -> str:
    """Whether the code of a step was loaded or compiled, its key, its file and its age."""
    how = "loaded" if compiled.from_cache else "compiled"
    first, *more = compiled.executable.origins or ("",)
    origins = f"; {first}{f' and {len(more)} more pieces' if more else ''}" if first else ""
    return f"{compiled.lowered.name}: {how} in {compiled.seconds:.1f} s{origins}"


def _say_lints(cfg: Config, lowered: stages.Lowered) -> None:
    """What looks like a mistake in the training step; a UserError with --run.strict. Notes are said and no errors."""
    found = lints(lowered, cfg.mesh.remat) if lowered.signature.donated else []
    for lint in found:
        lints_log.warning("%s %s", "note:" if lint.note else "this looks like a mistake:", lint)
    if cfg.run.strict and (wrong := [lint for lint in found if not lint.note]):
        raise UserError(f"--run.strict: {'; '.join(map(str, wrong))}")


def _lowered(
    traced: stages.Traced, cfg: Config, mesh: Mesh, hardware: Hardware | None, folder: Path | None
) -> tuple[dump.DumpWriter | None, stages.Lowered]:
    """The lowered step, and the writer of its stages into `folder`, to be finished once it is compiled."""
    writer = dump.DumpWriter(folder, hardware, mesh, _about(cfg)) if folder else None
    return writer, config_stages.lower(traced, cfg, mesh, writer.observer(traced) if writer else passes.unobserved)


def _about(cfg: Config) -> dict[str, str]:
    """How a dump is made, for its index."""
    flags = " ".join(f"--{name}={value}" for name, value in changed(cfg).items())
    return {"command": versions.command(), "flags that differ from their defaults": flags, **versions.versions()}


def compile_only(cfg: Config, mesh: Mesh, hardware: Hardware | None) -> None:
    """Say what a step takes and needs on `hardware` (None: Ascend 910B1 for backend npu, else this CPU, measured), dump
    the graphs of one device where that is asked for, and compile where it can be done without other processes."""
    hardware = hardware or named("ascend_910b1" if cfg.run.backend == "npu" else "cpu", cfg.model.compute_dtype)
    ge = ge_budget.make(cfg, mesh, hardware)
    log.info("%s", report.as_text(plan.make(cfg, mesh, hardware), ge))
    if mesh.size == 1 and cfg.run.backend != "npu":
        compile(cfg, mesh, hardware, None, bool(cfg.run.eval_every))
        return
    log.info("not compiled: that takes %d processes, each with its device", mesh.size)
    folder = dump_folder(cfg, None)
    if folder:
        writer, lowered = _lowered(config_stages.train(cfg), cfg, mesh, hardware, folder)
        assert writer is not None
        writer.finish(lowered, ge=ge)
