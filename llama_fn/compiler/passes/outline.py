"""Repeated layers become one subgraph that is called once per layer, so that compile time does not grow with depth.

    %a0 = ... layers/0        subgraph layers_forward(...) { ... }
    %a1 = ... layers/1   ->   %a0 = invoke_subgraph(layers_forward, ...)
                              %a1 = invoke_subgraph(layers_forward, ...)

A region is every op of one phase whose scope has the same prefix up to a number ("layers/3", or
"microbatch/1/layers/3"). Regions with the same ops, wiring, shapes and strides share a subgraph. A region that other
ops stand inside of (they use one of its results and feed another of its ops) stays inline, and so does a region
that has no twin.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch

from llama_fn import compat
from llama_fn.compiler import ir


@dataclass(frozen=True)
class Region:
    name: str
    nodes: tuple[torch.fx.Node, ...]
    inputs: tuple[torch.fx.Node, ...]
    outputs: tuple[torch.fx.Node, ...]


def outline(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    ir.warn_without_layers(gm.graph, "outline", "compile time grows with depth")
    groups: dict[str, list[Region]] = defaultdict(list)
    for region in _regions(gm.graph):
        groups[_shape_of(region)].append(region)
    made = 0
    renamed: dict[torch.fx.Node, torch.fx.Node] = {}  # what stands for a value that moved into a subgraph
    for regions in groups.values():
        if len(regions) < 2:
            continue
        regions = [replace(r, inputs=tuple(renamed.get(n, n) for n in r.inputs)) for r in regions]
        name = f"{regions[0].name}_{made}"
        made += 1
        gm.add_submodule(name, _subgraph(regions[0]))
        for region in regions:
            inputs = tuple(renamed.get(n, n) for n in region.inputs)
            renamed |= _call(gm, name, replace(region, inputs=inputs))
    gm.recompile()
    return gm


def _regions(graph: torch.fx.Graph) -> list[Region]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    members: dict[tuple[str, str], list[torch.fx.Node]] = defaultdict(list)
    for node in ir.calls(graph):
        scope = ir.place_of(node)
        if scope.is_layer:
            members[(scope.place, ir.phase_of(node))].append(node)
    regions = []
    for (_, phase), nodes in members.items():
        inside = set(nodes)
        users = {user for node in nodes for user in node.users} - inside
        if any(order[user] < order[nodes[-1]] for user in users):
            continue
        inputs = dict.fromkeys(n for node in nodes for n in ir.operands(node) if n not in inside)
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        regions.append(Region(f"{ir.place_of(nodes[0]).group}_{phase}", tuple(nodes), tuple(inputs), tuple(outputs)))
    return regions


def _shape_of(region: Region) -> str:
    """The same text for regions that one subgraph can serve."""
    names: dict[torch.fx.Node, str] = {node: f"in{i}" for i, node in enumerate(region.inputs)}
    names |= {node: f"v{i}" for i, node in enumerate(region.nodes)}
    lines = [f"{names[n]}: {_layout(compat.node_value(n))}" for n in region.inputs]
    for node in region.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
        lines.append(f"{names[node]} = {node.target} {args}")
    return "\n".join([*lines, *(names[n] for n in region.outputs)])


def _layout(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"


def _subgraph(region: Region) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for i, node in enumerate(region.inputs):
        values[node] = graph.placeholder(f"in{i}")
        values[node].meta["val"] = compat.node_value(node)
    for node in region.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output([values[n] for n in region.outputs])
    return compat.graph_module(torch.nn.Module(), graph)


def _call(gm: torch.fx.GraphModule, name: str, region: Region) -> dict[torch.fx.Node, torch.fx.Node]:
    """Put a call in the region's place; returns which value now stands for each of its outputs."""
    last = region.nodes[-1]
    where = {**compat.labels(last), "scope": ir.place_of(last).place, "source": ""}
    new: list[torch.fx.Node] = []
    with gm.graph.inserting_after(last):
        body = gm.graph.get_attr(name)
    with gm.graph.inserting_after(body):
        call = gm.graph.call_function(compat.INVOKE_SUBGRAPH, (body, name, *region.inputs))
    call.meta["val"] = tuple(compat.node_value(n) for n in region.outputs)
    anchor = call
    for i, old in enumerate(region.outputs):
        with gm.graph.inserting_after(anchor):
            anchor = gm.graph.call_function(operator.getitem, (call, i))
        anchor.meta["val"] = compat.node_value(old)
        new.append(anchor)
    for node in (call, *new):
        node.meta["custom"] = where
    for old, fresh in zip(region.outputs, new, strict=True):
        old.replace_all_uses_with(fresh, delete_user_cb=lambda user: user not in region.nodes)
    for node in reversed(region.nodes):
        gm.graph.erase_node(node)
    return dict(zip(region.outputs, new, strict=True))
