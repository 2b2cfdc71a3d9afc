"""Which mesh, rules, microbatches and remat policy for a number of devices: every candidate planned, the rest said why.

For each mesh, rules and size of microbatch the first remat policy that fits is taken, from none to full, as each
recomputes more than the one before; and gradients are reduced once a step unless only reducing per microbatch fits.
Pipelines are tried with 1F1B, and the fastest of them with the other schedules too, and with two chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any, Literal

import torch

from llama_fn import tree
from llama_fn.config import Config
from llama_fn.errors import UserError
from llama_fn.hardware import Hardware
from llama_fn.model import train_step
from llama_fn.planner import config_stages, piped, plan, survey
from llama_fn.planner.report import GB
from sharding.errors import ShardingError
from sharding.rules import PRESETS

SEQUENCES = (1, 2, 4)  # of a microbatch on a device
PIPELINES = 3  # so many of the fastest are tried with other schedules
OTHER_SCHEDULES: tuple[tuple[Literal["interleaved", "zb_h1"], int], ...] = (("interleaved", 2), ("zb_h1", 1))
ENDS = 3  # layers at either end that are told apart: enough for meshes of two axes, and smaller than survey.ENDS
POLICIES: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")


@dataclass(frozen=True)
class Tried:
    """A candidate: its plan where it fits, else why not."""

    cfg: Config
    plan: plan.Plan | None
    why: str = ""

    @property
    def where(self) -> str:
        """ "data:4,model:2 fsdp_tp"."""
        return f"{self.cfg.mesh.axes or 'one device'} {self.cfg.mesh.rules}"

    @property
    def name(self) -> str:
        """Mesh, rules and options, in words."""
        return f"{self.where}, {self.how}"

    @property
    def how(self) -> str:
        """Microbatches and remat, in words."""
        m, d, o = self.cfg.mesh, self.cfg.data, self.cfg.optim
        often = ", reduced per microbatch" if o.reduce_per_microbatch else ""
        again = ", weights gathered again" if m.regather else ""
        chunks = f" of {m.chunks} chunks" if m.chunks > 1 else ""
        order = f", {m.schedule}{chunks}" if "pipe" in m.axes else ""
        return f"{d.microbatches} microbatches{order}{often}, remat {m.remat}{again}"

    @property
    def flags(self) -> str:
        """The flags that ask train.py for this."""
        m, d, o = self.cfg.mesh, self.cfg.data, self.cfg.optim
        order = f"--mesh.schedule={m.schedule} --mesh.chunks={m.chunks} " if "pipe" in m.axes else ""
        return (
            f"--mesh.axes={m.axes} {order}--mesh.rules={m.rules} --data.microbatches={d.microbatches} "
            f"--mesh.remat={m.remat} "
            f"--mesh.regather={str(m.regather).lower()} "
            f"--optim.reduce_per_microbatch={str(o.reduce_per_microbatch).lower()}"
        )


def search(
    cfg: Config,
    devices: int,
    hardware: Hardware,
    progress: Callable[[str], None] = lambda name: None,
    processes: int = 1,
) -> list[Tried]:
    """Candidates that fit, the most tokens/s first, then the others. `progress` hears what has been tried.

    Meshes are planned by so many processes; with more than one, the caller's module is imported by each.
    """
    families = list(_families(cfg, devices))
    done: dict[int, list[Tried]] = {}
    for i, tried in _each(families, hardware, processes):
        done[i] = tried
        progress(f"{len(done)} of {len(families)} meshes and rules tried, the last {tried[-1].where}")
    everything = [tried for _, each in sorted(done.items()) for tried in each]
    piped = [t for t in sorted(everything, key=_rate) if t.plan and t.plan.pipeline][:PIPELINES]
    others = [[each] for tried in piped for each in _other_schedules(tried.cfg)]
    for i, (_, tried) in enumerate(_each(others, hardware, processes)):
        everything += [each for each in tried if each.plan]
        progress(f"{i + 1} of {len(others)} other schedules tried, the last {tried[-1].where}")
    return _verified(sorted(everything, key=_rate), hardware)


def _rate(tried: Tried) -> float:
    """The fastest first, what does not fit last."""
    return -tried.plan.tokens_per_second_per_device if tried.plan else 1.0


def _other_schedules(cfg: Config) -> Iterator[Config]:
    """The same pipeline worked on in other orders, where its layers and microbatches go."""
    for schedule, chunks in OTHER_SCHEDULES:
        other = replace(cfg, mesh=replace(cfg.mesh, schedule=schedule, chunks=chunks))
        try:
            piped.work(other, config_stages.mesh(other))
        except UserError:
            continue
        yield other


def _each(
    families: Sequence[Sequence[Config]], hardware: Hardware, processes: int
) -> Iterator[tuple[int, list[Tried]]]:
    """What every family gives, with its number, the first that is done first."""
    if processes == 1:
        yield from ((i, _try(family, hardware)) for i, family in enumerate(families))
        return
    # Not forked from here: who calls may have threads, and JAX or OpenMP in them.
    with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
        numbers = {pool.submit(_try, family, hardware): i for i, family in enumerate(families)}
        for done in as_completed(numbers):
            yield numbers[done], done.result()


def _families(cfg: Config, devices: int) -> Iterator[list[Config]]:
    """Meshes with rules, each with its microbatches, the smallest first. Sequences are cut, over `context`, only where
    there are fewer than devices to take them."""
    batch = cfg.data.global_batch_size
    for pipe, model in product(_divisors(devices), repeat=2):
        rest = devices // pipe // model
        if devices % (pipe * model) or cfg.model.num_layers % pipe:
            continue
        data = max(n for n in _divisors(rest) if batch % n == 0)
        # Fewer microbatches than stages leave most of a pipeline idle.
        sizes = [data * n for n in SEQUENCES if batch % (data * n) == 0 and (pipe == 1 or batch // (data * n) >= pipe)]
        for rules in _rules(data, model, context=rest // data) if sizes else ():
            extents = (("pipe", pipe), ("data", data), ("context", rest // data), ("model", model))
            axes = ",".join(f"{name}:{size}" for name, size in extents if size > 1)
            mesh = replace(cfg.mesh, axes=axes, rules=rules, schedule="1f1b", chunks=1, stage_layers="")
            yield [replace(cfg, mesh=mesh, data=replace(cfg.data, microbatches=batch // size)) for size in sizes]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _rules(data: int, model: int, context: int) -> tuple[str, ...]:
    if context > 1:
        return ("fsdp_tp_ulysses",)
    if model == 1:
        return ("fsdp", "zero1", "dp") if data > 1 else ("dp",)
    return ("fsdp_tp", "tp_sp") if data > 1 else ("tp_sp",)


_TRACES = plan.Traces()  # of this process


def _try(family: Sequence[Config], hardware: Hardware) -> list[Tried]:
    """The first option that fits each size of microbatch, or why none does. A batch in one piece is apart: it needs no
    sums of gradients, and may fit where smaller pieces do not."""
    pieces = [base for base in family if base.data.microbatches > 1]
    whole = [base for base in family if base.data.microbatches == 1]
    return [tried for sizes in (pieces, whole) if sizes for tried in _by_size(sizes, hardware)]


def _by_size(family: Sequence[Config], hardware: Hardware) -> list[Tried]:
    """What is too much for one size is too much for a larger one, and where the most frugal option is too much for the
    smallest, nothing fits."""
    tries: list[Tried] = []
    first = 0
    for base in family:
        options = list(_options(base))
        tried = _plan(options[min(first, len(options) - 1)], hardware)
        if tried.plan is None and not tries:
            frugal = _plan(options[-1], hardware)
            if frugal.plan is None:
                return [frugal]
        while tried.plan is None and first + 1 < len(options):
            first += 1
            tried = _plan(options[first], hardware)
        tries.append(tried)
        if tried.plan is None:
            break
    return tries


def _options(base: Config) -> Iterator[Config]:
    """From the fastest to the most frugal: when to reduce gradients, and what to keep for the backward."""
    shards = base.mesh.rules.startswith("fsdp")
    for often in (False, True) if base.data.microbatches > 1 and base.mesh.rules != "dp" else (False,):
        for policy in POLICIES:
            mesh = replace(base.mesh, remat=policy, regather=shards and policy != "none")
            yield replace(base, mesh=mesh, optim=replace(base.optim, reduce_per_microbatch=often))


def _plan(cfg: Config, hardware: Hardware, ends: int = ENDS) -> Tried:
    reason = _why_not(cfg, hardware)
    if reason:
        return Tried(cfg, None, reason)
    try:
        made = plan.make(cfg, config_stages.mesh(cfg), hardware, _TRACES, ends)
    except UserError as error:
        return Tried(cfg, None, str(error))
    if made.fits:
        return Tried(cfg, made)
    tried = Tried(cfg, None)
    room = (hardware.hbm_bytes - made.reserved_bytes) / GB
    return replace(tried, why=f"peak {made.peak_bytes / GB:.1f} GB where {room:.1f} are free, with {tried.how}")


def _verified(tries: list[Tried], hardware: Hardware) -> list[Tried]:
    """The best planned again as the planner does by itself; the next one if it does not fit after all."""
    for i, tried in enumerate(tries):
        if tried.plan is None:
            break
        tries[i] = _plan(tried.cfg, hardware, survey.ENDS)
        if tries[i].plan is not None:
            break
    return sorted(tries, key=lambda t: t.plan is None)


def _why_not(cfg: Config, hardware: Hardware) -> str:
    """Without tracing, "" if nothing: a dimension that does not divide, or what lives through the step is too much."""
    state, what, limit = (
        train_step.abstract_state(cfg),
        "the state",
        hardware.hbm_bytes - hardware.reserved.runtime_bytes,
    )
    try:
        size = _local_bytes(cfg, state)
        if size <= limit and cfg.data.microbatches > 1 and not cfg.optim.reduce_per_microbatch:
            # They add up in float32 or wider, laid out as the weights that the layers read.
            sums = tree.map(lambda p: replace(p, dtype=torch.float32, table="compute"), state.params)
            size, what = size + _local_bytes(cfg, sums), "the state and the microbatches' sum of gradients"
    except (ShardingError, ValueError) as error:
        return str(error)
    takes = "takes" if what == "the state" else "take"
    return f"{what} alone {takes} {size / GB:.1f} GB where {limit / GB:.1f} are free" if size > limit else ""


def _local_bytes(cfg: Config, infos: Any) -> int:
    """Of one device's part of a tree."""
    return sum(config_stages.local_bytes(infos, "state", config_stages.mesh(cfg), PRESETS[cfg.mesh.rules]).values())


def as_text(tried: Sequence[Tried], best: int = 10) -> str:
    """The `best` that fit, fastest first, and why the others do not."""
    fits = [t for t in tried if t.plan]
    lines = [f"{'tokens/s':>9} {'MFU':>6} {'peak GB':>8}  what, per device, sending hidden behind computing"]
    for t in fits[:best]:
        assert t.plan is not None
        p = t.plan
        lines.append(f"{p.tokens_per_second_per_device:9.1f} {p.mfu:6.3f} {p.peak_bytes / GB:8.1f}  {t.name}")
    lines += [f"... and {len(fits) - best} more that fit"] if len(fits) > best else []
    lines += ["", "rejected", *(f"  {t.where}: {t.why}" for t in tried if not t.plan)]
    return "\n".join([*lines, "", f"best: {fits[0].flags}" if fits else "none fits"])
