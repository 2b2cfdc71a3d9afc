"""What a lowered step costs, as named numbers, and the same of a larger model from two smaller ones.

Layers repeat, so every number of a step grows linearly with their count once the first and last are told apart, and
microbatches after the second are alike. A survey is a dict from key to number:

    ("argument", path)                bytes of an input
    ("flops" | "moved" | "seconds", scope, phase)     layers and microbatches taken together
    ("count" | "sent", *row, i)       of the i-th collective in such a row
    ("saved",)                        bytes that one microbatch keeps from its forward to its backward
    ("live", *place, i)               bytes of temporaries that live at the i-th op of a place

`extrapolated` is exact; tests/llama_fn/test_plan.py compares it with surveys of whole steps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels.registry import tensor_bytes
from kernels.scope_names import GATHER, parse, without_numbers
from llama_fn.compat import node_value
from llama_fn.compiler import calls, cost, ir, liveness, stages
from llama_fn.errors import UserError
from llama_fn.hardware import Hardware
from sharding import collectives_table

Survey = dict[tuple[Any, ...], float]
ENDS = 4  # layers at either end that are told apart: a reduction over two axes is done three layers later
MICROBATCHES = 3  # the first, the last, and one that stands for all between


def survey(lowered: stages.Lowered, hardware: Hardware, microbatches: int, ends: int = ENDS) -> Survey:
    """`microbatches`: how many the step has; from MICROBATCHES on, `lowered` is of as many. `ends` layers at either end
    are told apart."""
    graph = lowered.graph_module.graph
    costs = spent(lowered, hardware, microbatches)
    layers = lowered.signature.in_infos[_stacked(lowered)].shape[0]
    for path, node in zip(lowered.signature.in_paths, ir.placeholders(graph), strict=True):
        times = microbatches / min(microbatches, MICROBATCHES) if path.startswith("batch.") else 1
        costs["argument", path] = tensor_bytes(node_value(node)) * times
    costs[("saved",)] = _saved(graph)
    ordinals: Counter[tuple[Any, ...]] = Counter()
    for node, live in zip(ir.calls(graph), liveness.live_bytes(lowered.graph_module), strict=True):
        if cost.is_view(node):
            continue
        at = place_of(node, layers, ends)
        costs["live", *at, ordinals[at]] = live
        ordinals[at] += 1
    return dict(costs)


def spent(lowered: stages.Lowered, hardware: Hardware, microbatches: int = 1) -> Survey:
    """What computes and what is sent; `microbatches`: more than `lowered` has, if it has MICROBATCHES of them."""
    costs: Survey = defaultdict(float)
    rows: dict[tuple[Any, ...], Counter[int]] = defaultdict(Counter)
    for node, count in calls.counted(lowered.graph_module):
        times = count * (microbatches - 2 if _alike(node, microbatches) else 1)
        place = (without_numbers(ir.scope_of(node)), ir.phase_of(node))
        flops, moved = cost.flops_of(node), cost.moved(node)
        for name, number in (("flops", flops), ("moved", moved), ("seconds", seconds(flops, moved, hardware))):
            costs[name, *place] += times * number
        row = collectives_table.row_of(node)
        if row is not None:
            rows[row.phase, row.scope, row.kind, row.axis, row.dtype, row.source][row.bytes] += times
    for key, sizes in rows.items():
        for i, (size, count) in enumerate(sorted(sizes.items())):
            costs["count", *key, i], costs["sent", *key, i] = count, size
    return costs


def _stacked(lowered: stages.Lowered) -> int:
    """An input with the layers in its first dimension."""
    return next(i for i, info in enumerate(lowered.signature.in_infos) if info.axes[:1] == ("layers",))


def _alike(node: torch.fx.Node, microbatches: int) -> bool:
    return microbatches > MICROBATCHES and ir.place_of(node).microbatch == 1


def place_of(node: torch.fx.Node, layers: int, ends: int) -> tuple[str, str, int | None, str]:
    """Phase, scope, layer counted from the nearer end (the last is -1; None in the middle or outside), and target."""
    scope, layer = ir.place_of(node), None
    if scope.layer is None:
        return ir.phase_of(node), ir.scope_of(node), None, str(node.target)
    index = scope.layer
    layer = index if index < ends else index - layers if index >= layers - ends else None
    return ir.phase_of(node), scope.with_layer(layer), layer, str(node.target)


def extrapolated(small: Survey, larger: Survey, steps: int) -> Survey:
    """`larger` has one layer more than `small`, which has 2 x ends; the result has `steps` more than `small`."""
    odd = [key for key in small.keys() ^ larger.keys() if key in small or key[0] != "live" or "/*" not in key[2]]
    if odd:
        raise UserError(
            "the planner cannot tell from a few layers what many take: the graphs of two sizes differ in more than "
            f"their numbers ({odd[0]}). Layers must be alike, and named with kernels.scope_names.layer(i)"
        )
    return {key: number + steps * (larger[key] - number) for key, number in small.items()}


def total(costs: Survey, kind: str) -> float:
    """The sum of one kind of cost over scopes and phases."""
    return sum(number for key, number in costs.items() if key[0] == kind)


def peak(costs: Survey) -> tuple[float, str]:
    """Bytes of temporaries at the most, and where: op and scope."""
    live = {key: number for key, number in costs.items() if key[0] == "live"}
    if not live:
        return 0.0, ""
    at = max(live, key=live.__getitem__)
    return live[at], f"{at[4]} in {at[2]}"


@dataclass(frozen=True)
class Moment:
    """The most that lives in one part of the step: a layer of a microbatch in one phase, or what stands between."""

    phase: str
    part: str
    bytes: int


def timeline(costs: Survey, base: int, layers: int, ends: int) -> list[Moment]:
    """The step's parts in their order, `base` bytes being there all the time; layers between the ends in a straight
    line from the one before to the one after, as what they keep grows by the same from each to the next."""
    parts: dict[tuple[str, str], float] = {}
    for key, live in costs.items():
        if key[0] == "live":
            at = (key[1], _part(key[2]))
            parts[at] = max(parts.get(at, 0.0), live)
    moments: list[Moment] = []
    for (phase, part), live in parts.items():
        before = moments[-1] if moments else None
        scope = parse(part)
        before_gap = {"backward": ends - 1, "forward": -ends}.get(phase)
        missing = layers - 2 * ends if scope.layer is not None and scope.layer == before_gap else 0
        for i in range(1, missing + 1) if before else ():
            height = before.bytes + (base + live - before.bytes) * i / (missing + 1)  # type: ignore[union-attr]
            moments.append(Moment(phase, scope.with_layer(None), round(height)))
        moments.append(Moment(phase, part, round(base + live)))
    return moments


def _part(scope: str) -> str:
    """microbatch/0/layers/3 of microbatch/0/layers/3/mlp; the first name of what is in no layer."""
    parsed = parse(scope)
    return parsed.place if parsed.is_layer else parsed.in_microbatch(None).split("/")[0]


def collectives(costs: Mapping[tuple[Any, ...], float]) -> list[collectives_table.Collective]:
    """In the order of their first appearance."""
    rows = []
    for key, count in costs.items():
        if key[0] == "count":
            phase, scope, kind, axis, dtype, source, _ = key[1:]
            size = round(costs["sent", *key[1:]])
            rows.append(collectives_table.Collective(phase, scope, kind, axis, dtype, size, source, round(count)))
    return rows


def seconds(flops: float, moved: float, hardware: Hardware) -> float:
    """The larger of an op's FLOPs over the peak and its bytes over the bandwidth of HBM."""
    return max(flops / hardware.peak_flops_per_s, moved / hardware.hbm_bytes_per_s)


def _saved(graph: torch.fx.Graph) -> int:
    """Bytes that the first microbatch makes in its forward and reads in its backward, gathered and cast weights
    apart."""
    kept = {
        node
        for node in ir.calls(graph)
        if ir.phase_of(node) == "forward" and ir.place_of(node).microbatch == 0
        if ir.place_of(node).role != GATHER and not cost.is_view(node)
        if any(ir.phase_of(user) == "backward" for user in _readers(node))
    }
    return sum(tensor_bytes(node_value(node)) for node in kept)


def _readers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Users, those of views of the value included."""
    readers = []
    for user in node.users:
        readers += _readers(user) if cost.is_view(user) and ir.phase_of(user) == "forward" else [user]
    return readers
