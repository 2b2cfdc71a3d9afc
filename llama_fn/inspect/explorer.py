"""A graph as JSON for Google's model-explorer (ai-edge-model-explorer): layers collapse, overlays colour nodes.

model-explorer rank_0/NN_lowered.json       then "Add per-node data": NN_lowered.time_us.json, .bytes.json, ...
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from kernels.registry import tensor_bytes
from kernels.scope_names import without_numbers
from llama_fn import compat
from llama_fn.compiler import calls, cost, ir
from llama_fn.hardware import Hardware
from llama_fn.model.arrays import describe
from llama_fn.planner import survey
from llama_fn.planner.links import bandwidth
from sharding import Mesh, collectives_table

MEASURED_US = ".measured_us"
Overlay = dict[torch.fx.Node, float]


def files(gm: torch.fx.GraphModule, name: str, hardware: Hardware | None, mesh: Mesh) -> dict[str, Any]:
    """File ending -> content: the graph, and what to lay over it, with the unit in the name: bytes of results, bytes
    that collectives send, FLOP, and µs at the peaks of `hardware` where it is known."""
    nodes = [{"id": each, "nodes": [_node(n) for n in one.graph.nodes]} for each, one in _graphs(gm, name).items()]
    ops = [n for one in _graphs(gm, name).values() for n in ir.calls(one.graph) if not calls.is_packing(n)]
    overlays: dict[str, Overlay] = {
        ".bytes": {n: 0.0 if cost.is_view(n) else tensor_bytes(compat.node_value(n)) for n in ops},
        ".sent_bytes": {n: row.bytes for n in ops if (row := collectives_table.row_of(n))},
        ".flop": {n: cost.flops_of(n) for n in ops},
    }
    if hardware is not None:
        overlays[".time_us"] = {n: _predicted(n, hardware, mesh) * 1e6 for n in ops}
    laid_over = {ending: _laid_over(gm, name, values) for ending, values in overlays.items()}
    return {"": {"label": name, "graphs": nodes}} | laid_over


def measured(
    gm: torch.fx.GraphModule, name: str, seconds: Mapping[tuple[str, str], float], hardware: Hardware, mesh: Mesh
) -> dict[str, Any]:
    """An overlay in µs of what a profile measured by scope and phase, as long as one run of an op takes: what a scope
    took is shared among its ops as predicted for `hardware`."""
    whole: dict[tuple[str, str], float] = defaultdict(float)
    times: Overlay = {}
    for node, count in calls.counted(gm):
        times[node] = _predicted(node, hardware, mesh)
        whole[_place(node)] += count * times[node]
    shares = {n: s / whole[_place(n)] * seconds.get(_place(n), 0.0) * 1e6 for n, s in times.items() if s}
    return _laid_over(gm, name, shares)


def _place(node: torch.fx.Node) -> tuple[str, str]:
    return without_numbers(ir.scope_of(node)), ir.phase_of(node)


def _predicted(node: torch.fx.Node, hardware: Hardware, mesh: Mesh) -> float:
    """Seconds of an op by itself."""
    row = collectives_table.row_of(node)
    sending = row.bytes / bandwidth(row.axis, mesh, hardware) if row else 0.0
    return max(survey.seconds(cost.flops_of(node), cost.moved(node), hardware), sending)


def _graphs(gm: torch.fx.GraphModule, name: str) -> dict[str, torch.fx.GraphModule]:
    return {name: gm} | {called: body for body, called in ir.subgraphs(gm).items()}


def _laid_over(gm: torch.fx.GraphModule, name: str, values: Overlay) -> dict[str, Any]:
    """Numbers of ops, zeros left out; a call has none, its body's ops have theirs for one call."""
    found = {
        each: {node.name: {"value": values[node]} for node in one.graph.nodes if values.get(node)}
        for each, one in _graphs(gm, name).items()
    }
    return {
        each: {"results": results, "gradient": _COLOURS} for each, results in found.items() if results or each == name
    }


_COLOURS = [{"stop": 0, "bgColor": "#f4f7fb"}, {"stop": 1, "bgColor": "#d9480f"}]


def _node(node: torch.fx.Node) -> dict[str, Any]:
    labels = compat.labels(node)
    operands = ir.operands(node)
    value = node.meta.get("val")
    results = value if isinstance(value, (tuple, list)) else [] if value is None else [value]
    attributes = {
        **{key: labels.get(key) for key in ("phase", "source", "note", "name")},
        "sharding": node.meta.get("sharding"), "path": node.meta.get("path"),
        "arguments": ", ".join(repr(a) for a in node.args if not isinstance(a, (torch.fx.Node, list, tuple))),
    }  # fmt: skip
    outside = {"placeholder": "inputs", "output": "results"}.get(node.op)
    return {
        "id": node.name,
        "label": ir.target_text(node) if node.op == "call_function" else node.op,
        "namespace": outside or "/".join(filter(None, (ir.phase_of(node), ir.scope_of(node)))),
        "attrs": [{"key": key, "value": str(v)} for key, v in attributes.items() if v],
        "incomingEdges": [
            {"sourceNodeId": x.name, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
            for i, x in enumerate(operands)
        ],
        "outputsMetadata": [
            {"id": str(i), "attrs": [{"key": "tensor_shape", "value": describe(x)}]} for i, x in enumerate(results)
        ],
    }
