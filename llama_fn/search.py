"""Which mesh, rules, microbatches and remat policy for a number of devices: every candidate planned, the rest said why.

For each mesh, rules and size of microbatch the first remat policy that fits is taken, from none to full, as each
recomputes more than the one before; and gradients are reduced once a step unless only reducing per microbatch fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llama_fn import arrays, plan, rungs, train_step, tree
from llama_fn.config import Config
from llama_fn.errors import UserError
from llama_fn.hardware import Hardware
from llama_fn.report import GB
from sharding.errors import ShardingError, local_shape
from sharding.rules import PRESETS

SEQUENCES = (1, 2, 4)  # of a microbatch on a device
POLICIES: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")


@dataclass(frozen=True)
class Tried:
    """A candidate: its plan where it fits, else why not."""

    cfg: Config
    plan: plan.Plan | None
    why: str = ""

    @property
    def name(self) -> str:
        m, d, o = self.cfg.mesh, self.cfg.data, self.cfg.optim
        often = ", reduced per microbatch" if o.reduce_per_microbatch else ""
        again = ", weights gathered again" if m.regather else ""
        return f"{m.axes or 'one device'} {m.rules}, {d.microbatches} microbatches{often}, remat {m.remat}{again}"

    @property
    def flags(self) -> str:
        m, d, o = self.cfg.mesh, self.cfg.data, self.cfg.optim
        return (
            f"--mesh.axes={m.axes} --mesh.rules={m.rules} --data.microbatches={d.microbatches} --mesh.remat={m.remat} "
            f"--mesh.regather={str(m.regather).lower()} "
            f"--optim.reduce_per_microbatch={str(o.reduce_per_microbatch).lower()}"
        )


def search(
    cfg: Config, devices: int, hardware: Hardware, progress: Callable[[str], None] = lambda name: None
) -> list[Tried]:
    """Candidates that fit, the most tokens/s first, then the others. `progress` hears what is tried."""
    found, traces = [], plan.Traces()
    for base in _bases(cfg, devices):
        tried = [_why_not(base, hardware)]
        if tried[0] is None:
            tried = list(_until_one_fits(base, hardware, traces, progress))
        found += [each for each in tried if each is not None]
    return sorted(found, key=lambda t: -t.plan.tokens_per_second_per_device if t.plan else 1.0)


def _bases(cfg: Config, devices: int) -> Iterator[Config]:
    """Meshes, rules and microbatches."""
    for model in (n for n in range(1, devices + 1) if devices % n == 0):
        data = devices // model
        axes = ",".join(f"{name}:{size}" for name, size in (("data", data), ("model", model)) if size > 1)
        names = ("fsdp", "zero1", "dp") if model == 1 else ("fsdp_tp", "tp_sp") if data > 1 else ("tp_sp",)
        for rules in names if devices > 1 else ("dp",):
            for sequences in SEQUENCES:
                size = data * sequences
                if cfg.data.global_batch_size % size == 0:
                    yield replace(
                        cfg, mesh=replace(cfg.mesh, axes=axes, rules=rules),
                        data=replace(cfg.data, microbatches=cfg.data.global_batch_size // size),
                    )  # fmt: skip


def _until_one_fits(
    base: Config, hardware: Hardware, traces: plan.Traces, progress: Callable[[str], None]
) -> Iterator[Tried]:
    last = None
    shards = base.mesh.rules.startswith("fsdp")
    for often in (False, True) if base.data.microbatches > 1 and base.mesh.rules != "dp" else (False,):
        for policy in POLICIES:
            mesh = replace(base.mesh, remat=policy, regather=shards and policy != "none")
            cfg = replace(base, mesh=mesh, optim=replace(base.optim, reduce_per_microbatch=often))
            progress(Tried(cfg, None).name)
            try:
                made = plan.make(cfg, rungs.mesh(cfg), hardware, traces)
            except UserError as error:
                yield Tried(cfg, None, str(error))
                return
            if made.fits:
                yield Tried(cfg, made)
                return
            last = Tried(cfg, None, f"peak {made.peak_bytes / GB:.1f} GB of {hardware.hbm_bytes / GB:.0f}")
    if last is not None:
        yield last


def _why_not(cfg: Config, hardware: Hardware) -> Tried | None:
    """Without tracing: a dimension that does not divide, or a state that alone is too much."""
    mesh, rules, size = rungs.mesh(cfg), PRESETS[cfg.mesh.rules], 0
    state = train_step.abstract_state(cfg)
    try:
        for path, info in zip(tree.paths(state, "state"), tree.leaves(state), strict=True):
            layout = rules.layout(info.axes or (None,) * len(info.shape), info.table, mesh)
            local = local_shape(info.shape, layout, mesh, path, True)
            size += arrays.total_bytes(replace(info, shape=local))
    except (ShardingError, ValueError) as error:
        return Tried(cfg, None, str(error))
    if size > hardware.hbm_bytes:
        return Tried(cfg, None, f"the state alone takes {size / GB:.1f} GB of {hardware.hbm_bytes / GB:.0f}")
    return None


def as_text(tried: Sequence[Tried], best: int = 10) -> str:
    fits = [t for t in tried if t.plan]
    lines = [f"{'tokens/s':>9} {'MFU':>6} {'peak GB':>8}  what, per device, sending hidden behind computing"]
    for t in fits[:best]:
        assert t.plan is not None
        p = t.plan
        lines.append(f"{p.tokens_per_second_per_device:9.1f} {p.mfu:6.3f} {p.peak_bytes / GB:8.1f}  {t.name}")
    lines += [f"... and {len(fits) - best} more that fit"] if len(fits) > best else []
    lines += ["", "rejected", *(f"  {t.name}: {t.why}" for t in tried if not t.plan)]
    return "\n".join([*lines, "", f"best: {fits[0].flags}" if fits else "none fits"])
