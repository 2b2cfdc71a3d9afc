"""A graph as JSON for Google's model-explorer (ai-edge-model-explorer): layers collapse, overlays colour nodes.

model-explorer rank_0/NN_lowered.json       then "Add per-node data": NN_lowered.time.json, .bytes.json, .flops.json
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.registry import tensor_bytes
from llama_fn import compat
from llama_fn.compiler import calls, cost, ir
from llama_fn.hardware import Hardware
from llama_fn.model.arrays import describe
from llama_fn.planner import survey


def files(gm: torch.fx.GraphModule, name: str, hardware: Hardware | None) -> dict[str, Any]:
    """File ending -> content: the graph, and what to lay over it: bytes, FLOPs, and µs at the peaks of `hardware` where
    it is known."""
    graphs = {name: gm} | {called: body for body, called in ir.subgraphs(gm).items()}
    nodes = [{"id": each, "nodes": [_node(node) for node in one.graph.nodes]} for each, one in graphs.items()]
    laid_over = {each: _overlays(one.graph, hardware) for each, one in graphs.items()}
    return {"": {"label": name, "graphs": nodes}} | {
        ending: {
            each: {"results": {node: {"value": value} for node, value in values.items()}, "gradient": _COLOURS}
            for each in graphs
            if (values := laid_over[each][ending]) or each == name
        }
        for ending in laid_over[name]
    }


def _overlays(graph: torch.fx.Graph, hardware: Hardware | None) -> dict[str, dict[str, float]]:
    """Numbers of a graph's ops by file ending; a call has none, its body's ops have theirs for one call."""
    ops = [node for node in ir.calls(graph) if not calls.is_packing(node)]
    overlays: dict[str, dict[str, float]] = {
        ".bytes": {n.name: size for n in ops if not cost.is_view(n) and (size := tensor_bytes(compat.node_value(n)))},
        ".flops": {n.name: flops for n in ops if (flops := cost.flops_of(n))},
    }
    if hardware is not None:
        times = {n.name: survey.seconds(cost.flops_of(n), cost.moved(n), hardware) * 1e6 for n in ops}
        overlays[".time"] = {name: us for name, us in times.items() if us}
    return overlays


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
