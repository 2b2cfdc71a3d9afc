"""What a run will take, from its graphs alone: memory, FLOPs, communication and time per device, without a weight.

Times are a roofline: an op takes the larger of its FLOPs over the peak and its bytes over the HBM bandwidth, as if
alone and perfect, every pointwise op reading and writing memory once (compilers fuse them, so this part is an upper
bound); a collective takes its bytes over the slowest link that its mesh axes cross.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.registry import tensor_bytes
from llama_fn import arrays, cost, ir, rungs, stages, train_step
from llama_fn.compat import node_value
from llama_fn.config import Config
from llama_fn.hardware import Hardware
from sharding import Mesh, table
from sharding.collectives import axes_of


@dataclass(frozen=True)
class Transfer:
    """One row of the table of collectives with what it costs; `seconds` for all `count` of them."""

    row: table.Collective
    seconds: float


@dataclass(frozen=True)
class Place:
    """A scope, its layers and microbatches taken together: what it computes, moves and sends, and seconds at peak."""

    scope: str
    phase: str
    flops: int
    bytes: int
    math_s: float
    memory_s: float
    comms_s: float

    @property
    def bound(self) -> str:
        """The largest of the three."""
        times = {"compute": self.math_s, "memory": self.memory_s, "communication": self.comms_s}
        return max(times, key=times.__getitem__)


@dataclass(frozen=True)
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
    timeline: list[int]  # live bytes over the step, at most 200 points
    model_flops: float
    hardware_flops: int
    compute_s: float
    comms_s: float
    transfers: list[Transfer]
    places: list[Place]
    seconds: float  # that planning took

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.hardware.hbm_bytes

    @property
    def step_time_s(self) -> float:
        """Communication behind computation as far as it goes; step_time_alone_s: one after the other."""
        return max(self.compute_s, self.comms_s)

    @property
    def step_time_alone_s(self) -> float:
        return self.compute_s + self.comms_s

    @property
    def tokens_per_second_per_device(self) -> float:
        return self.cfg.data.global_batch_size * self.cfg.data.seq_len / self.mesh.size / self.step_time_s

    @property
    def mfu(self) -> float:
        return self.model_flops / self.step_time_s / self.hardware.peak_flops_per_s


def make(cfg: Config, mesh: Mesh, hardware: Hardware) -> Plan:
    """Trace and lower cfg's step for `mesh`; UserError where it cannot be partitioned."""
    began = time.perf_counter()
    state = train_step.abstract_state(cfg)
    lowered = rungs.lower(rungs.train(cfg), cfg, mesh)
    here = _bytes_by_path(lowered)
    infos = zip(lowered.signature.in_infos, here.values(), strict=True)
    moments = sum(size for info, size in infos if info.table == "moments")
    memory, tokens = lowered.memory_analysis(), cfg.data.global_batch_size * cfg.data.seq_len
    transfers = [Transfer(row, _seconds(row, mesh, hardware)) for row in lowered.collectives()]
    places = _places(lowered.graph_module, hardware, transfers)
    return Plan(
        cfg, mesh, hardware,
        parameters=arrays.total_size(state.params),
        parameters_bytes=sum(size for path, size in here.items() if path.startswith("state.params")),
        optimizer_bytes=sum(size for path, size in here.items() if path.startswith("state.opt_state")),
        gradients_bytes=moments // 2,  # laid out as either moment, in their dtype
        activations_bytes=_saved(lowered.graph_module),
        peak_bytes=memory.peak_bytes, peak_at=memory.peak_at,
        timeline=_thinned(cost.live_bytes(lowered.graph_module), memory.argument_bytes),
        model_flops=cost.model_flops_per_token(cfg.model, cfg.data.seq_len) * tokens / mesh.size,
        hardware_flops=lowered.cost_analysis().total_flops,
        compute_s=sum(_op_seconds(n, hardware) for n in ir.calls(lowered.graph_module.graph)),
        comms_s=sum(t.seconds for t in transfers),
        transfers=transfers, places=places, seconds=time.perf_counter() - began,
    )  # fmt: skip


def _bytes_by_path(lowered: stages.Lowered) -> dict[str, int]:
    """Bytes on one device of every input."""
    nodes = ir.placeholders(lowered.graph_module.graph)
    return {p: tensor_bytes(node_value(n)) for p, n in zip(lowered.signature.in_paths, nodes, strict=True)}


def _thinned(live: Sequence[int], base: int) -> list[int]:
    step = max(1, len(live) // 200)
    return [base + max(live[i : i + step]) for i in range(0, len(live), step)]


def _saved(gm: torch.fx.GraphModule) -> int:
    """Bytes that the forward makes and the backward still reads, gathered and cast weights apart."""
    kept = {
        node for node in ir.calls(gm.graph)
        if ir.phase_of(node) == "forward" and not re.match(r"(microbatch/\d+/)?gather/|cast", ir.scope_of(node))
        and not cost.is_view(node) and any(ir.phase_of(user) == "backward" for user in _readers(node))
    }  # fmt: skip
    return sum(tensor_bytes(node_value(node)) for node in kept)


def _readers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Users, those of views of the value included."""
    found = []
    for user in node.users:
        found += _readers(user) if cost.is_view(user) else [user]
    return found


def bandwidth(axes: str, mesh: Mesh, hardware: Hardware) -> float:
    """Bytes/s of the slowest link among devices that differ along `axes`, ranks filling machine after machine."""
    group = mesh.groups(axes_of(axes))[0]
    inside = max(group) - min(group) < hardware.per_machine and mesh.size > 1
    return hardware.link_bytes_per_s if inside else hardware.network_bytes_per_s


def _seconds(row: table.Collective, mesh: Mesh, hardware: Hardware) -> float:
    return row.bytes * row.count / bandwidth(row.axis, mesh, hardware)


def _moved(node: torch.fx.Node) -> int:
    if cost.is_view(node) or table.kind_of(node):
        return 0
    return tensor_bytes([node_value(n) for n in ir.operands(node)]) + tensor_bytes(node_value(node))


def _op_seconds(node: torch.fx.Node, hardware: Hardware) -> float:
    return max(cost.flops_of(node) / hardware.peak_flops_per_s, _moved(node) / hardware.hbm_bytes_per_s)


def _places(gm: torch.fx.GraphModule, hardware: Hardware, transfers: Sequence[Transfer]) -> list[Place]:
    """In the order of the step."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for node in ir.calls(gm.graph):
        place = totals[re.sub(r"\b\d+\b", "*", ir.scope_of(node)), ir.phase_of(node)]
        place[0] += cost.flops_of(node)
        place[1] += _moved(node)
    comms: dict[tuple[str, str], float] = defaultdict(float)
    for t in transfers:
        comms[t.row.scope, t.row.phase] += t.seconds
    return [
        Place(
            scope, phase, flops, moved, flops / hardware.peak_flops_per_s, moved / hardware.hbm_bytes_per_s,
            comms[scope, phase],
        )
        for (scope, phase), (flops, moved) in totals.items()
    ]  # fmt: skip
