"""Small collectives that could run at once travel as one: what they cost is the start, not the bytes.

    %a = all_reduce(%x, "data")           %r = join_rows([%x, %y])
    %b = all_reduce(%y, "data")    ->     %s = all_reduce(%r, "data")
                                          %a, %b = split_rows(%s)

Together go those of one kind, axes, dtype and scope but for its last part, up to SMALL bytes each, none of which needs
another's result. The bucket stands where its first result is used.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.registry import tensor_bytes
from kernels.rows import join_rows, shapes_text, split_rows
from llama_fn import compat
from llama_fn.compiler import ir
from sharding.abstract_eval import AbstractEval
from sharding.collectives import STARTS, all_gather, all_reduce, reduce_scatter

SMALL = 256 * 1024  # at some 10 GB/s about what starting a collective costs, tens of microseconds
BUCKETED = (all_gather.op, all_reduce.op, reduce_scatter.op)
_STARTS = tuple(STARTS[name].op for name in ("all_gather", "all_reduce", "reduce_scatter"))  # as overlap leaves them


def bucket(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with collectives of one kind, axes and scope joined into one."""
    if ctx.mesh.size == 1:
        return gm
    of_member = {m: b for b in _buckets(gm.graph) if len(b.members) > 1 for m in b.members}
    if of_member:
        _Placing(gm.graph, of_member).run()
    return gm


@dataclass
class _Bucket:
    key: tuple[Any, ...]
    members: list[torch.fx.Node] = field(default_factory=list)
    needs: int = 0  # bit set of the buckets whose results reach a member


def joinable(graph: torch.fx.Graph) -> Counter[str]:
    """By axes, how many collectives fewer a lowered graph would have if this pass had not been left out."""
    fewer: Counter[str] = Counter()
    for each in _buckets(graph):
        alone = [member for member in each.members if ir.made_by(member) != "bucket"]
        fewer[each.key[1]] += max(len(alone) - 1, 0)
    return +fewer


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
    if node.target not in (*BUCKETED, *_STARTS) or not node.users:  # others want what a stage sends, not what it gets
        return None
    value = compat.node_value(_sent(node))
    if tensor_bytes(value) > SMALL:
        return None
    scope = ir.scope_of(node).rpartition("/")[0] or ir.scope_of(node)
    kind = node.args[3] if node.target in (all_reduce.op, STARTS["all_reduce"].op) else ""
    return node.target, node.args[1], node.args[2], kind, value.dtype, ir.phase_of(node), scope


class _Placing:
    """Puts buckets into a graph and its other nodes in an order in which operands come first."""

    def __init__(self, graph: torch.fx.Graph, of_member: dict[torch.fx.Node, _Bucket]) -> None:
        self.graph, self.of_member = graph, of_member
        self.done: set[torch.fx.Node] = set()
        self.last: torch.fx.Node | None = None

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node not in self.of_member:
                self._place(node)

    def _place(self, node: torch.fx.Node) -> None:
        if node in self.done:
            return
        if node in self.of_member:
            self._put_together(self.of_member[node])
            return
        for operand in ir.operands(node):
            self._place(operand)
        if self.last is not None and self.last.next is not node:
            self.last.append(node)
        self.last = node
        self.done.add(node)

    def _put_together(self, bucket: _Bucket) -> None:
        for member in bucket.members:
            self._place(_sent(member))
        assert self.last is not None
        together = _Together(self.graph, bucket, self.last)
        for member, result in together.results().items():
            member.replace_all_uses_with(result)
            self.graph.erase_node(member)
        self.done.update(bucket.members, together.made)
        self.last = together.made[-1]


class _Together:
    """Emits one bucket after the node `last`."""

    def __init__(self, graph: torch.fx.Graph, bucket: _Bucket, last: torch.fx.Node) -> None:
        self.graph, self.members = graph, bucket.members
        self.made = [last]
        self.sent = [_sent(member) for member in self.members]
        self.target, self.axes, self.n, self.kind, *_, self.scope = bucket.key
        self.values = AbstractEval.of(compat.node_value(self.sent[0]))

    def results(self) -> dict[torch.fx.Node, torch.fx.Node]:
        scattered = self.target is reduce_scatter.op
        dims = ",".join("0" if self.kind else str(member.args[3]) for member in self.members)
        rows = self._emit(join_rows.op, self.sent, self.n if scattered else 1, dims)
        moved = self._emit(self.target, rows, self.axes, self.n, self.kind or 0)
        shapes = shapes_text([compat.node_value(member).shape for member in self.members])
        parts = self._emit(split_rows.op, moved, dims, shapes)
        return {member: self._emit(operator.getitem, parts, i) for i, member in enumerate(self.members)}

    def _emit(self, target: Callable[..., Any], *args: Any) -> torch.fx.Node:
        with self.graph.inserting_after(self.made[-1]):
            node = self.graph.call_function(target, args)
        self.made.append(node)
        node.meta["val"] = self.values.result(target, args)
        scopes = {ir.scope_of(member) for member in self.members}
        sources = dict.fromkeys(str(compat.labels(member).get("source", "")) for member in self.members)
        node.meta["custom"] = {
            **compat.labels(self.members[0]),
            "scope": scopes.pop() if len(scopes) == 1 else self.scope,
            "source": "; ".join(filter(None, sources)),
            ir.MADE_BY: "bucket",
        }
        return node
