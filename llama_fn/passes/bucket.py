"""Small collectives that could run at once travel as one: what they cost is the start, not the bytes.

    %a = all_reduce(%x, "data")           %r = join_rows([%x, %y])
    %b = all_reduce(%y, "data")    ->     %s = all_reduce(%r, "data")
                                          %a, %b = split_rows(%s)

Together go those of one kind, axes, dtype and scope but for its last part, up to SMALL bytes each, none of which needs
another's result. The bucket stands where its first result is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.registry import tensor_bytes
from kernels.rows import join_rows, shapes_text, split_rows
from llama_fn import compat, ir
from sharding.collectives import all_gather, all_reduce, reduce_scatter

SMALL = 256 * 1024  # at some 10 GB/s about what starting a collective costs, tens of microseconds
BUCKETED = (all_gather.op, all_reduce.op, reduce_scatter.op)


def bucket(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    if ctx.mesh.size == 1:
        return gm
    of_member = {m: b for b in _buckets(gm.graph) if len(b.members) > 1 for m in b.members}
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}

    def emit(node: torch.fx.Node) -> None:
        if node in values:
            return
        if node in of_member:
            found = of_member[node]
            for member in found.members:
                emit(_sent(member))
            values.update(_Together(graph, found, values).results())
            return
        for operand in ir.operands(node):
            emit(operand)
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = node.meta

    for node in gm.graph.nodes:
        if node not in of_member:
            emit(node)
    return compat.graph_module(gm, graph)


@dataclass
class _Bucket:
    key: tuple[Any, ...]
    members: list[torch.fx.Node] = field(default_factory=list)
    needs: int = 0  # bit set of the buckets whose results reach a member


def _buckets(graph: torch.fx.Graph) -> list[_Bucket]:
    """Greedy, in the graph's order: a collective joins the last bucket of its key unless that waits for itself then."""
    buckets: list[_Bucket] = []
    latest: dict[tuple[Any, ...], int] = {}
    reached: dict[torch.fx.Node, int] = {}

    def closure(needs: int) -> int:
        done, todo = 0, needs
        while todo:
            index = todo.bit_length() - 1
            done |= 1 << index
            todo = (todo | buckets[index].needs) & ~done
        return done

    for node in graph.nodes:
        needs = 0
        for operand in ir.operands(node):
            needs |= reached[operand]
        key = _key(node)
        if key is not None:
            needs = closure(needs)
            index = latest.get(key, -1)
            if index < 0 or needs >> index & 1:
                index = latest[key] = len(buckets)
                buckets.append(_Bucket(key))
            buckets[index].members.append(node)
            buckets[index].needs |= needs
            needs = 1 << index
        reached[node] = needs
    return buckets


def _sent(node: torch.fx.Node) -> torch.fx.Node:
    operand = node.args[0]
    assert isinstance(operand, torch.fx.Node)
    return operand


def _key(node: torch.fx.Node) -> tuple[Any, ...] | None:
    """What collectives must have in common to travel together; None for what does not."""
    if node.target not in BUCKETED:
        return None
    value = compat.node_value(_sent(node))
    if tensor_bytes(value) > SMALL:
        return None
    scope = ir.scope_of(node).rpartition("/")[0] or ir.scope_of(node)
    kind = node.args[3] if node.target is all_reduce.op else ""
    return node.target, node.args[1], node.args[2], kind, value.dtype, ir.phase_of(node), scope


class _Together:
    """Emits one bucket."""

    def __init__(self, graph: torch.fx.Graph, found: _Bucket, values: dict[torch.fx.Node, torch.fx.Node]) -> None:
        self.graph, self.members = graph, found.members
        self.sent = [values[_sent(member)] for member in self.members]
        self.target, self.axes, self.n, self.kind, *_, self.scope = found.key
        self.world = compat.FakeTensors.of(compat.node_value(self.sent[0]))

    def results(self) -> dict[torch.fx.Node, torch.fx.Node]:
        scattered = self.target is reduce_scatter.op
        dims = ",".join("0" if self.kind else str(member.args[3]) for member in self.members)
        rows = self._emit(join_rows.op, self.sent, self.n if scattered else 1, dims)
        moved = self._emit(self.target, rows, self.axes, self.n, self.kind or 0)
        shapes = shapes_text([compat.node_value(member).shape for member in self.members])
        parts = self._emit(split_rows.op, moved, dims, shapes)
        return {member: self._emit(operator.getitem, parts, i) for i, member in enumerate(self.members)}

    def _emit(self, target: Callable[..., Any], *args: Any) -> torch.fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = self.world.run(target, *torch.fx.node.map_arg(args, compat.node_value))
        scopes = {ir.scope_of(member) for member in self.members}
        sources = dict.fromkeys(str(compat.labels(member).get("source", "")) for member in self.members)
        node.meta["custom"] = {
            **compat.labels(self.members[0]),
            "scope": scopes.pop() if len(scopes) == 1 else self.scope,
            "source": " ".join(filter(None, sources)),
        }
        return node
