"""Repeated layers become one subgraph that is called once per layer, so that compile time does not grow with depth.

    %a0 = ... layers/0        subgraph layers_forward(...) { ... }
    %a1 = ... layers/1   ->   %a0 = invoke_subgraph(layers_forward, ...)
                              %a1 = invoke_subgraph(layers_forward, ...)

A candidate is every op of one phase whose scope has the same prefix up to a number ("layers/3", or
"microbatch/1/layers/3"). Regions with the same ops, wiring, shapes and strides share a subgraph. A candidate that other
ops stand inside of (they use one of its results and feed another of its ops) stays inline, and so does a candidate
that has no twin.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch

from llama_fn import compat
from llama_fn.compiler import calls, ir


@dataclass(frozen=True)
class Candidate:
    """Ops of one layer in one phase, which may share their code with those of other layers."""

    name: str
    nodes: tuple[torch.fx.Node, ...]
    inputs: tuple[torch.fx.Node, ...]
    outputs: tuple[torch.fx.Node, ...]


def outline(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with repeated layers, in each of the bodies that it calls too, as calls of one subgraph."""
    ops = [node for node, _ in calls.counted(gm)]
    ir.warn_without_layers(ops, "outline", "compile time grows with depth")
    for each in (*calls.bodies(gm), gm):
        _outline(each)
    return gm


def _outline(gm: torch.fx.GraphModule) -> None:
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in _candidates(gm.graph):
        groups[_shape_of(candidate)].append(candidate)
    made = 0
    renamed: dict[torch.fx.Node, torch.fx.Node] = {}  # what stands for a value that moved into a subgraph
    for candidates in groups.values():
        if len(candidates) < 2:
            continue
        candidates = [replace(r, inputs=tuple(renamed.get(n, n) for n in r.inputs)) for r in candidates]
        name = f"{candidates[0].name}_{made}"
        made += 1
        gm.add_submodule(name, _subgraph(candidates[0]))
        for candidate in candidates:
            inputs = tuple(renamed.get(n, n) for n in candidate.inputs)
            renamed |= _call(gm, name, replace(candidate, inputs=inputs))
    gm.recompile()


def _candidates(graph: torch.fx.Graph) -> list[Candidate]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    members: dict[tuple[str, str], list[torch.fx.Node]] = defaultdict(list)
    for node in ir.calls(graph):
        scope = ir.place_of(node)
        if scope.is_layer and not calls.is_packing(node):
            members[(scope.place, ir.phase_of(node))].append(node)
    candidates = []
    for (_, phase), nodes in members.items():
        inside = set(nodes)
        users = {user for node in nodes for user in node.users} - inside
        if any(order[user] < order[nodes[-1]] for user in users):
            continue
        inputs = dict.fromkeys(n for node in nodes for n in ir.operands(node) if n not in inside)
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        candidates.append(
            Candidate(f"{ir.place_of(nodes[0]).group}_{phase}", tuple(nodes), tuple(inputs), tuple(outputs))
        )
    return candidates


def _shape_of(candidate: Candidate) -> str:
    """The same text for candidates that one subgraph can serve."""
    names: dict[torch.fx.Node, str] = {node: f"in{i}" for i, node in enumerate(candidate.inputs)}
    names |= {node: f"v{i}" for i, node in enumerate(candidate.nodes)}
    lines = [f"{names[n]}: {_layout(compat.node_value(n))}" for n in candidate.inputs]
    for node in candidate.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
        lines.append(f"{names[node]} = {node.target} {args}")
    return "\n".join([*lines, *(names[n] for n in candidate.outputs)])


def _layout(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"


def _subgraph(candidate: Candidate) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for i, node in enumerate(candidate.inputs):
        values[node] = graph.placeholder(f"in{i}")
        values[node].meta["val"] = compat.node_value(node)
    for node in candidate.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output([values[n] for n in candidate.outputs])
    return compat.graph_module(torch.nn.Module(), graph)


def _call(gm: torch.fx.GraphModule, name: str, candidate: Candidate) -> dict[torch.fx.Node, torch.fx.Node]:
    """Put a call in the candidate's place; returns which value now stands for each of its outputs."""
    last = candidate.nodes[-1]
    where = {**compat.labels(last), "scope": ir.place_of(last).place, "source": ""}
    new: list[torch.fx.Node] = []
    with gm.graph.inserting_after(last):
        body = gm.graph.get_attr(name)
    with gm.graph.inserting_after(body):
        call = gm.graph.call_function(compat.INVOKE_SUBGRAPH, (body, name, *candidate.inputs))
    call.meta["val"] = tuple(compat.node_value(n) for n in candidate.outputs)
    anchor = call
    for i, old in enumerate(candidate.outputs):
        with gm.graph.inserting_after(anchor):
            anchor = gm.graph.call_function(operator.getitem, (call, i))
        anchor.meta["val"] = compat.node_value(old)
        new.append(anchor)
    for node in (call, *new):
        node.meta["custom"] = where
    for old, fresh in zip(candidate.outputs, new, strict=True):
        old.replace_all_uses_with(fresh, delete_user_cb=lambda user: user not in candidate.nodes)
    for node in reversed(candidate.nodes):
        gm.graph.erase_node(node)
    return dict(zip(candidate.outputs, new, strict=True))
