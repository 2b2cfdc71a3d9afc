"""A graph that does nothing but call bodies, and speak with other stages: what stands between becomes a body too.

    %a = ...                                    %p0 = call(%part_0, %params, %tokens)
    %b = ...
    %c1 = call(%microbatch, [%a], %b)     ->    %c1 = call(%microbatch, [%p0[0]], %p0[1])
    %c2 = call(%microbatch, %c1, %b)            %c2 = call(%microbatch, %c1, %p0[1])
    %d = ...                                    %p1 = call(%part_1, %c2[0], %params)

So a backend can compile each body once, whatever the number of its calls, and make the calls in turn
(backends/in_turn.py).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.barrier import barrier
from kernels.repeat import call
from llama_fn import compat
from llama_fn.compiler import calls, cost, ir
from sharding.collectives import wait
from sharding.messages import is_message, over_stages

Nodes = dict[torch.fx.Node, torch.fx.Node]


@dataclass
class _Part:
    """Ops that stand between calls, and their graph; `inputs`: what they read of others."""

    ops: list[torch.fx.Node]
    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    values: Nodes = field(default_factory=dict)
    inputs: list[torch.fx.Node] = field(default_factory=list)


def in_pieces(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm` with each op in a body; the bodies that it has are shared with it. Without calls, all of it is one body."""
    parts, between = _parts(gm)
    needed = {used for nodes in between for node in nodes for used in node.all_input_nodes}
    needed |= set(ir.output_node(gm.graph).all_input_nodes)
    for part in parts:
        _write(part)
        needed.update(part.inputs)

    root, graph, values = torch.nn.Module(), torch.fx.Graph(), Nodes()

    def copied(node: torch.fx.Node) -> torch.fx.Node:
        new = graph.node_copy(node, values.__getitem__)
        new.meta = dict(node.meta)
        return new

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = copied(node)
        elif node.op == "get_attr":
            compat.add_body(root, str(node.target), getattr(gm, str(node.target)))
            values[node] = copied(node)
    for number, (part, following) in enumerate(zip(parts, between, strict=True)):
        results = [node for node in part.ops if node in needed]
        if part.ops:
            _call(part, results, f"part_{number}", root, graph, values)
        for node in following:
            values[node] = copied(node)
    copied(ir.output_node(gm.graph))
    return compat.graph_module(root, graph)


def _parts(gm: torch.fx.GraphModule) -> tuple[list[_Part], list[list[torch.fx.Node]]]:
    """The ops between calls, and after each of these parts the calls up to the next, with what packs their operands.

    An op between two calls that does not wait for the first stands before both: it takes one's own tokens apart.
    """
    parts, between = list[_Part](), list[list[torch.fx.Node]]()
    since: list[torch.fx.Node] = []  # ops since the last call
    packing: list[torch.fx.Node] = []  # and what packs operands of the next
    home: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in ir.calls(gm.graph):
        if stands_between(node):
            if parts and not any(map(_waits, since)):
                parts[-1].ops += since
            else:
                parts.append(_Part(since))
                between.append([])
            home |= dict.fromkeys(since, parts[-1].ops)
            between[-1] += [*packing, node]
            since, packing = [], []
        elif calls.is_packing(node):
            result = node.target is operator.getitem and node.args[0].target is call  # type: ignore[union-attr]
            (between[-1] if result else packing).append(node)
        elif node.target is operator.getitem and node.args[0] in home:
            home[node.args[0]].append(node)  # type: ignore[index]  # a part's results are tensors
        else:
            since.append(node)
    return [*parts, _Part(since)], [*between, []]


def stands_between(node: torch.fx.Node) -> bool:
    """Whether a node is in no part: a call, or what stages of a pipeline do together, which is nothing to compile."""
    return calls.is_call(node) or is_message(node) or over_stages(node)


def _waits(op: torch.fx.Node) -> bool:
    """Whether an op reads a result of what stands between parts, or writes."""
    read = op.all_input_nodes
    return op.target is torch.ops.aten.copy_.default or any(calls.is_packing(x) or stands_between(x) for x in read)


def _write(part: _Part) -> None:
    """The part's graph, its results apart."""
    for op in part.ops:
        args, kwargs = torch.fx.node.map_arg((op.args, op.kwargs), lambda used: _inside(part, used))
        _put(part, op, args, kwargs)


def _put(part: _Part, op: torch.fx.Node, args: Any, kwargs: Any) -> torch.fx.Node:
    part.values[op] = new = part.graph.create_node(op.op, op.target, args, kwargs, op.name, op.type)
    new.meta = dict(op.meta)
    return new


def _inside(part: _Part, node: torch.fx.Node) -> torch.fx.Node:
    """What stands for a node in a part: its copy, an input of the part or, of a view of an input of the whole graph, a
    view made again.

    A donated input is overwritten after all have read it, which a compiler can only ensure that sees who does.
    """
    if node in part.values:
        return part.values[node]
    if node.op == "call_function" and _is_of_input(node):
        if node.target is barrier.op:  # from part to part the calls keep the order
            part.values[node] = _inside(part, node.args[0])  # type: ignore[arg-type]
            return part.values[node]
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda used: _inside(part, used))
        return _put(part, node, args, kwargs)
    part.inputs.append(node)
    part.values[node] = new = part.graph.placeholder(node.name)
    new.meta = {key: value for key, value in node.meta.items() if key in ("val", "path", "sharding")}
    return new


def _is_of_input(node: torch.fx.Node) -> bool:
    """Whether a node is an input of the graph, or lives in the memory of one."""
    if node.op == "placeholder":
        return True
    source = node.args[0] if node.args else None
    return (
        cost.is_view(node) and node.target is not wait.op and isinstance(source, torch.fx.Node) and _is_of_input(source)
    )


def _call(
    part: _Part, results: list[torch.fx.Node], name: str, root: torch.nn.Module, graph: torch.fx.Graph, values: Nodes
) -> None:
    """Make the part a body, and call it."""
    out = part.graph.output([part.values[node] for node in results])
    out.meta["paths"] = [""] * len(results)
    labels = {"scope": "", "phase": "forward", "source": ""}
    body = graph.get_attr(compat.add_body(root, name, compat.graph_module(torch.nn.Module(), part.graph)))
    made = graph.call_function(call, (body, *(values[node] for node in part.inputs)))
    made.meta = {"val": tuple(compat.node_value(node) for node in results), "custom": labels}
    for i, node in enumerate(results):
        values[node] = new = graph.call_function(operator.getitem, (made, i))
        new.meta = dict(node.meta)
