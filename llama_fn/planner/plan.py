"""What a run will take, from its graphs alone: memory, FLOPs, communication and time per device, without a weight.

Times are a roofline: an op takes the larger of its FLOPs over the peak and its bytes over the HBM bandwidth, as if
alone and perfect, every pointwise op reading and writing memory once (compilers fuse them, so this part is an upper
bound); a collective takes its bytes over the slowest link that its mesh axes cross. The step is simulated with these
times: its ops in their order on the streams of a device (streams.py), and the stages of a pipeline (piped.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_fn import html, tree
from llama_fn.compiler import stages
from llama_fn.compiler.garbage import uncollected
from llama_fn.config import Config
from llama_fn.hardware import Hardware
from llama_fn.model import arrays, train_step
from llama_fn.model.flops import model_flops_per_token
from llama_fn.planner import config_stages, piped, streams
from llama_fn.planner.links import bandwidth
from llama_fn.planner.piped import PipelinePlan
from llama_fn.planner.survey import (
    ENDS,
    MICROBATCHES,
    Moment,
    Survey,
    collectives,
    extrapolated,
    peak,
    spent,
    survey,
    timeline,
    total,
)
from sharding import Mesh, collectives_table
from sharding.stages import stage_count

Traces = dict[Any, stages.Traced]


@dataclass(frozen=True)
class Transfer:
    """One row of the table of collectives with what it costs; `seconds` for all `count` of them."""

    row: collectives_table.Collective
    seconds: float


@dataclass(frozen=True)
class ScopeCost:
    """A scope, its layers and microbatches taken together: what it computes, moves and sends, and seconds at peak."""

    scope: str
    phase: str
    flops: int
    bytes: int
    math_s: float
    memory_s: float
    comms_s: float

    @property
    def seconds(self) -> float:
        """If the three hide one another."""
        return max(self.math_s, self.memory_s, self.comms_s)

    @property
    def bound(self) -> str:
        """The largest of the three."""
        times = {"compute": self.math_s, "memory": self.memory_s, "communication": self.comms_s}
        return max(times, key=times.__getitem__)


@dataclass(frozen=True, repr=False)
class Plan:
    """Per device and step; bytes and FLOPs are counted from the lowered graph of one device, seconds are predicted."""

    cfg: Config
    mesh: Mesh
    hardware: Hardware
    parameters: int  # of the whole model
    parameters_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    peak_bytes: int
    peak_at: str
    timeline: list[Moment]  # the step's parts in their order, of microbatches the first, the last and one between
    model_flops: float
    hardware_flops: int
    compute_s: float
    comms_s: float
    transfers: list[Transfer]
    scopes: list[ScopeCost]
    step_time_s: float  # as simulated, collectives of each axis on a stream of their own
    one_stream_s: float  # the same with one stream for all collectives
    seconds: float  # that planning took
    pipeline: PipelinePlan | None = (
        None  # of several stages: peaks are of the one that takes most, times of the slowest
    )

    def __repr__(self) -> str:
        return "\n  ".join(f"{name}: {value}" for name, value in self._overview())

    def _repr_html_(self) -> str:
        heavy = sorted(self.transfers, key=lambda t: -t.seconds)
        rows = [(t.row.kind, t.row.axis, t.row.scope, t.row.count, round(t.row.bytes / 1e6, 3)) for t in heavy]
        sends = html.table(("collective", "axis", "scope", "count", "MB each"), rows) if rows else ""
        return html.table(("", ""), self._overview()) + f"<details><summary>sends</summary>{sends}</details>"

    def _overview(self) -> list[tuple[str, str]]:
        room = f"{'fits with' if self.fits else 'does not fit by'} {abs(self.spare_bytes) / 1e9:.2f} GB"
        return [
            ("plan of", f"{self.cfg.model.preset}, {self.parameters:,} parameters"),
            ("devices", f"{self.mesh.size} x {self.hardware.name}, {self.mesh}, rules {self.cfg.mesh.rules}"),
            ("peak", f"{self.peak_bytes / 1e9:.3f} GB of {self.hardware.hbm_bytes / 1e9:.1f}, which {room}"),
            ("step", f"{self.step_time_s:.3f} s; computing {self.compute_s:.3f} s, sending {self.comms_s:.3f} s"),
            ("speed", f"{self.tokens_per_second_per_device:.1f} tokens/s per device, MFU {self.mfu:.3f}"),
        ]

    @property
    def stage_peaks(self) -> list[int]:
        """The peak of a device of each stage of a pipeline; their arguments are alike."""
        taken = [stage.temporary_bytes for stage in self.pipeline.stages] if self.pipeline else []
        return [self.peak_bytes - max(taken) + size for size in taken]

    @property
    def reserved_bytes(self) -> int:
        """What the runtime takes: a communicator for each group that a collective names, and one of the world."""
        groups = {t.row.axis for t in self.transfers}
        return round(self.hardware.reserved_bytes(len(groups) + (self.mesh.size > 1)))

    @property
    def spare_bytes(self) -> int:
        """What is left of the device's memory; negative where that is too small."""
        return round(self.hardware.hbm_bytes) - self.reserved_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak and what is reserved fit in the device's memory."""
        return self.spare_bytes >= 0

    @property
    def step_time_alone_s(self) -> float:
        """Seconds of a step whose sending hides behind nothing."""
        return self.compute_s + self.comms_s if self.pipeline is None else self.pipeline.alone_s

    @property
    def tokens_per_second_per_device(self) -> float:
        """As simulated."""
        return self.cfg.data.global_batch_size * self.cfg.data.seq_len / self.mesh.size / self.step_time_s

    @property
    def mfu(self) -> float:
        """Model FLOPs of a step over the peak of the data sheet, as simulated."""
        peak = self.hardware.rated_flops_per_s or self.hardware.peak_flops_per_s
        return self.model_flops / self.step_time_s / peak


@uncollected()
def make(cfg: Config, mesh: Mesh, hardware: Hardware, traces: Traces | None = None, ends: int = ENDS) -> Plan:
    """Trace and lower cfg's step for `mesh`, with fewer layers and microbatches where these repeat (survey.py);
    UserError where it cannot be partitioned. `traces` keeps what was traced, for plans that share it; fewer `ends` make
    smaller graphs, and the peak of some plans inexact."""
    began = time.perf_counter()
    traces = {} if traces is None else traces
    if stage_count(mesh) > 1:
        return _piped(cfg, mesh, hardware, traces, began)
    layers, microbatches = cfg.model.num_layers, cfg.data.microbatches
    repeats = layers > 2 * ends + 1 and cfg.mesh.remat != "budget"  # which keeps values in some layers only
    sizes = (2 * ends, 2 * ends + 1) if repeats else (layers,)
    lowered = [_lowered(config_stages.small(cfg, n, min(microbatches, MICROBATCHES)), mesh, traces) for n in sizes]
    surveys = [survey(each, hardware, microbatches, ends) for each in lowered]
    times = [streams.of_step(each, hardware, microbatches) for each in lowered]
    spent = times[-1].beyond(times[0], layers - 2 * ends - 1) if repeats else times[0]
    costs = extrapolated(surveys[0], surveys[1], layers - 2 * ends) if repeats else surveys[0]
    arguments = {key[1]: round(size) for key, size in costs.items() if key[0] == "argument"}
    temporary, peak_at = peak(costs)
    # The survey tells the ops of a microbatch apart exactly, by their scopes; the clock by their order.
    computing = total(costs, "seconds")
    return _plan(
        cfg, mesh, hardware, costs, arguments, began, round(costs[("saved",)]),
        step_time_s=computing + spent.waiting_s, one_stream_s=computing + spent.waiting_on_one_stream_s,
        peak_bytes=sum(arguments.values()) + round(temporary), peak_at=peak_at,
        timeline=timeline(costs, sum(arguments.values()), layers, ends),
    )  # fmt: skip


def _piped(cfg: Config, mesh: Mesh, hardware: Hardware, traces: Traces, began: float) -> Plan:
    """The plan of a pipeline, from the programs of two small ones."""
    piped.refuse(cfg, mesh)
    held, order = piped.work(cfg, mesh)
    smalls = [_lowered(piped.small(cfg, held, piped.SMALL + more), mesh, traces) for more in (0, 1)]
    made, costs = piped.predicted(smalls[0], smalls[1], held, order, hardware, cfg)
    arguments = piped.argument_bytes(cfg, replace(smalls[0].rules, blocks=held.sizes), mesh)
    fullest = max(range(held.count), key=lambda stage: made.stages[stage].temporary_bytes)
    most = made.stages[fullest]
    return _plan(
        cfg, mesh, hardware, costs[made.slowest], arguments, began, most.kept_bytes,
        step_time_s=made.step_s, one_stream_s=made.one_stream_s,
        peak_bytes=sum(arguments.values()) + most.temporary_bytes, peak_at=f"{most.peak_at}, stage {fullest}",
        timeline=[], pipeline=made,
    )  # fmt: skip


def _plan(
    cfg: Config, mesh: Mesh, hardware: Hardware, costs: Survey, arguments: dict[str, int], began: float, kept: int,
    **more: Any,
) -> Plan:  # fmt: skip
    """From the survey of one device, the bytes of its arguments and `kept`, what it keeps for backwards."""
    state = train_step.abstract_state(cfg)
    infos = dict(zip(tree.paths(state, "state"), tree.leaves(state), strict=True))
    transfers = _transfers(costs, mesh, hardware)
    tokens = cfg.data.global_batch_size * cfg.data.seq_len
    moments = [size for path, size in arguments.items() if path in infos and infos[path].table == "moments"]
    return Plan(
        cfg, mesh, hardware,
        parameters=arrays.total_size(state.params),
        parameters_bytes=sum(size for path, size in arguments.items() if path.startswith("state.params")),
        optimizer_bytes=sum(size for path, size in arguments.items() if path.startswith("state.opt_state")),
        gradients_bytes=sum(moments) // 2,  # laid out as either moment, in their dtype
        activations_bytes=kept,
        model_flops=model_flops_per_token(cfg.model, cfg.data.seq_len) * tokens / mesh.size,
        hardware_flops=round(total(costs, "flops")),
        compute_s=total(costs, "seconds"),
        comms_s=sum(t.seconds for t in transfers),
        transfers=transfers, scopes=_scopes(costs, hardware, transfers), seconds=time.perf_counter() - began, **more,
    )  # fmt: skip


def _lowered(cfg: Config, mesh: Mesh, traces: Traces) -> stages.Lowered:
    key = (cfg.model, replace(cfg.data, global_batch_size=0), cfg.optim)
    sized = (*key, cfg.data.global_batch_size)
    if key not in traces:
        traces[key] = traces[sized] = config_stages.train(cfg)
    if sized not in traces:
        traces[sized] = traces[key].resized(*train_step.abstract_arguments(cfg))
    return config_stages.lower(traces[sized], cfg, mesh)


def scope_costs(lowered: stages.Lowered, hardware: Hardware) -> list[ScopeCost]:
    """What every scope of a whole step computes, moves and sends."""
    costs = spent(lowered, hardware)
    return _scopes(costs, hardware, _transfers(costs, lowered.mesh, hardware))


def _transfers(costs: Survey, mesh: Mesh, hardware: Hardware) -> list[Transfer]:
    rows = collectives(costs)
    return [Transfer(row, row.bytes * row.count / bandwidth(row.axis, mesh, hardware)) for row in rows]


def _scopes(costs: Survey, hardware: Hardware, transfers: Sequence[Transfer]) -> list[ScopeCost]:
    """In the order of the step."""
    comms: dict[tuple[str, str], float] = defaultdict(float)
    for t in transfers:
        comms[t.row.scope, t.row.phase] += t.seconds
    scopes = []
    for key, flops in costs.items():
        if key[0] == "flops":
            moved = costs["moved", *key[1:]]
            math_s, memory_s = flops / hardware.peak_flops_per_s, moved / hardware.hbm_bytes_per_s
            scopes.append(ScopeCost(key[1], key[2], round(flops), round(moved), math_s, memory_s, comms[key[1:]]))
    return scopes
