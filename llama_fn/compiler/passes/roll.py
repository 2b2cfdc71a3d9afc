"""Microbatches that run the same ops in the same order become calls of one body.

    microbatch/0 ...                                    microbatch/0 ...
    microbatch/1 ...   the same ops in the same order   %c1 = call(%microbatch, [sums], %tokens1, %shared)
    microbatch/2 ...                               ->   %c2 = call(%microbatch, %c1, %tokens2, %shared)
    microbatch/3 ...   the last                         ... as many as the step has ...
                                                        microbatch/9 ...   the last

A step is lowered with four of its microbatches (compiler/shorten.py), whatever their number: the first overlaps with
the gathers of its weights, the last with the reductions of its gradients, and the two between must come out alike. That
is checked, op by op. What one of them hands to the next (sums of gradients, a gather begun ahead) are the body's first
inputs and its results. Where they are not alike, :class:`NotAlike` says which op differs, and every microbatch is
written out (compiler/lowering.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch

from kernels.repeat import call, group
from kernels.scope_names import microbatch
from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.compiler.shorten import Missing

Nodes = dict[torch.fx.Node, torch.fx.Node]
Pair = tuple[torch.fx.Node, torch.fx.Node]  # what one microbatch reads, and what the next reads in its place


class NotAlike(Exception):
    """Two microbatches between the first and the last came out different."""


def roll(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with a call for each microbatch but the first and the last, those that it lacks included."""
    if ctx.missing is None:
        return gm
    return _Roll(gm, ctx.missing).rolled()


class _Roll:
    def __init__(self, gm: torch.fx.GraphModule, missing: Missing) -> None:
        self.missing = missing
        nodes = list(gm.graph.nodes)
        begin, middle, end = _ends(nodes, missing.first - 1)
        self.before, self.one, self.two, self.after = (
            nodes[:begin], nodes[begin:middle], nodes[middle:end], nodes[end:],
        )  # fmt: skip
        self.in_one = {node: i for i, node in enumerate(self.one)}
        self.in_two = {node: i for i, node in enumerate(self.two)}
        self.carried: dict[Pair, None] = {}  # from a microbatch to the next
        self.shared: dict[Pair, None] = {}  # the same value in each
        self.indexed: dict[Pair, None] = {}  # each has its own: tokens
        if len(self.one) != len(self.two):
            raise NotAlike(f"one has {len(self.one)} ops, the next {len(self.two)}")
        for x, y in zip(self.one, self.two, strict=True):
            self._compare(x, y)

    def _compare(self, x: torch.fx.Node, y: torch.fx.Node) -> None:
        """Sort what the ops at one position of both read; NotAlike where they do not do the same."""
        if x.op != y.op or x.target != y.target or _frame(x) != _frame(y) or ir.phase_of(x) != ir.phase_of(y):
            raise NotAlike(f"{x.format_node()} in one is {y.format_node()} in the next")
        for a, b in zip(_read(x), _read(y), strict=True):
            if a in self.in_one:
                if self.in_one[a] != self.in_two.get(b):
                    raise NotAlike(f"{x} reads {a} of its microbatch, {y} of the next reads {b}")
            elif b in self.in_one:
                self.carried[a, b] = None
            elif a is b:
                self.shared[a, b] = None
            elif self._own(a, b):
                self.indexed[a, b] = None
            else:
                raise NotAlike(f"{x} reads {a}, {y} of the next microbatch reads {b}")

    def _own(self, a: torch.fx.Node, b: torch.fx.Node) -> bool:
        """Whether they are the parts of one value that belong to two microbatches, one after the other."""
        parts = a.target is operator.getitem is b.target and a.args[0] is b.args[0]
        return parts and self._number(a) + 1 == self._number(b)

    def _number(self, part: torch.fx.Node) -> int:
        """Of the microbatch that a part belongs to, among those of this graph."""
        number: Any = part.args[1]
        return number - self.missing.calls if number >= self.missing.first + 2 else number

    def rolled(self) -> torch.fx.GraphModule:
        root, graph = torch.nn.Module(), torch.fx.Graph()
        name = compat.add_body(root, "microbatch", self._body())
        values: Nodes = {}
        for node in self.before:
            _copy(node, graph, values)
        body = graph.get_attr(name)
        shared = graph.call_function(group, tuple(values[a] for a, _ in self.shared))
        shared.meta = {"val": tuple(compat.node_value(a) for a, _ in self.shared), "custom": _labels("step")}
        state: Any = [values[a] for a, _ in self.carried]
        for i in range(self.missing.calls + 2):
            number = self.missing.first + i
            own = [self._part(pair, i, graph, values) for pair in self.indexed]
            state = graph.call_function(call, (body, state, *own, shared))
            state.meta = {
                "val": tuple(compat.node_value(b) for _, b in self.carried), "custom": _labels(microbatch(number)),
            }  # fmt: skip
        self._take_apart(state, graph, values)
        for node in self.after:
            new = _copy(node, graph, values)
            place = ir.place_of(node)
            if place.microbatch == self.missing.first + 2:
                scope = place.in_microbatch(self.missing.first + 2 + self.missing.calls)
                new.meta["custom"] = {**compat.labels(node), "scope": scope}
        return compat.graph_module(root, graph)

    def _part(self, pair: Pair, i: int, graph: torch.fx.Graph, values: Nodes) -> torch.fx.Node:
        """What the i-th call has of its own where the first two have `pair`."""
        number = self._number(pair[0]) + i
        for node in pair:
            if node.args[1] == number:
                return values[node]
        source: Any = pair[0].args[0]
        new = graph.call_function(operator.getitem, (values[source], number))
        new.meta = dict(pair[0].meta)
        return new

    def _take_apart(self, last: torch.fx.Node, graph: torch.fx.Graph, values: Nodes) -> None:
        """Results of the last call, where anything after it reads them."""
        position = {self.in_one[b]: k for k, (_, b) in enumerate(self.carried)}
        for node in dict.fromkeys(x for reader in self.after for x in _read(reader)):
            if node in self.in_one or (node in self.in_two and self.in_two[node] not in position):
                raise NotAlike(f"{node} is read after its microbatch, and not by the next")
            if node in self.in_two:
                values[node] = graph.call_function(operator.getitem, (last, position[self.in_two[node]]))
                values[node].meta = dict(node.meta)

    def _body(self) -> torch.fx.GraphModule:
        graph, inputs = torch.fx.Graph(), dict[Pair, torch.fx.Node]()
        for i, pair in enumerate((*self.carried, *self.indexed, *self.shared)):
            inputs[pair] = graph.placeholder(f"in{i}")
            inputs[pair].meta = {k: v for k, v in pair[0].meta.items() if k in ("val", "sharding")}
        values: Nodes = {}
        for x, y in zip(self.one, self.two, strict=True):
            pairs = iter(zip(_read(x), _read(y), strict=True))

            def inside(_: torch.fx.Node, pairs: Iterator[Pair] = pairs) -> torch.fx.Node:
                pair = next(pairs)
                return inputs[pair] if pair in inputs else values[pair[0]]

            args, kwargs = torch.fx.node.map_arg((x.args, x.kwargs), inside)
            values[x] = graph.create_node(x.op, x.target, args, kwargs, x.name, x.type)
            scope = ir.place_of(x).in_microbatch(None)
            values[x].meta = {**x.meta, "custom": {**compat.labels(x), "scope": scope}}
        graph.output([values[b] for _, b in self.carried])
        return compat.graph_module(torch.nn.Module(), graph)


def _ends(nodes: list[torch.fx.Node], first: int) -> list[int]:
    """Where three microbatches end: behind the last op of each. The next may have begun before."""
    last = {ir.place_of(node).microbatch: i for i, node in enumerate(nodes) if node.op == "call_function"}
    return [last.get(number, -1) + 1 for number in range(first, first + 3)]


def _read(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes in a node's arguments, each as often as it stands there."""
    read: list[torch.fx.Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), read.append)
    return read


def _frame(node: torch.fx.Node) -> str:
    """A node's arguments but for which nodes they name."""
    return str(torch.fx.node.map_arg((node.args, node.kwargs), lambda _: "%"))


def _copy(node: torch.fx.Node, graph: torch.fx.Graph, values: Nodes) -> torch.fx.Node:
    values[node] = new = graph.node_copy(node, values.__getitem__)
    new.meta = dict(node.meta)
    return new


def _labels(scope: str) -> dict[str, str]:
    return {"scope": scope, "phase": "forward", "source": ""}
