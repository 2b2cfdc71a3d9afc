"""Microbatches that run the same ops in the same order become calls of one body.

    microbatch/0 ...                                    microbatch/0 ...
    microbatch/1 ...   the same ops in the same order   %c1 = call(%microbatch, [sums], %tokens1, %shared)
    microbatch/2 ...                               ->   %c2 = call(%microbatch, %c1, %tokens2, %shared)
    microbatch/3 ...   the last                         ... as many as the step has ...
                                                        microbatch/9 ...   the last

A step is lowered with four of its microbatches (compiler/shorten.py), whatever their number: the first overlaps with
the gathers of its weights, the last with the reductions of its gradients, and the two between must come out alike. That
they do is checked, op by op (compiler/alike.py). What one of them hands to the next (sums of gradients, a gather begun
ahead) are the body's first inputs and its results. Where they are not alike, :class:`NotAlike` says which op differs,
and all are written out (compiler/lowering.py). Where nothing is reduced, the last is like them and a call too.
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
from llama_fn.compiler.alike import Alike, NotAlike, Pair, operands
from llama_fn.compiler.shorten import Missing

Nodes = dict[torch.fx.Node, torch.fx.Node]


def roll(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with a call for each microbatch between the first and the last, those that it lacks included."""
    if ctx.missing is None:
        return gm
    _keep_together(gm.graph)
    return _Roll(gm, ctx.missing).rolled()


def _keep_together(graph: torch.fx.Graph) -> None:
    """Put what takes a tuple apart right behind it: what one microbatch hands to the next are tensors, where an op of
    the next was moved ahead without its results."""
    last: Nodes = {}
    for node in list(graph.nodes):
        if node.target is operator.getitem:
            source: Any = node.args[0]
            behind = last.get(source, source)
            if node.prev is not behind:
                behind.append(node)
            last[source] = node


class _Roll:
    def __init__(self, gm: torch.fx.GraphModule, missing: Missing) -> None:
        self.missing, nodes = missing, list(gm.graph.nodes)
        begin, middle, end, last = _ends(nodes, missing.first - 1)
        self.alike = Alike(nodes[begin:middle], nodes[middle:end], missing)
        self.before, self.after = nodes[:begin], nodes[end:]
        self.calls, self.last = missing.calls + 2, self.alike.in_two
        handed_on = [self.alike.in_one[b] for _, b in self.alike.carried]
        self.results = {position: k for k, position in enumerate(handed_on)}
        try:
            ending = Alike(nodes[middle:end], nodes[end:last], missing)
        except NotAlike:  # it overlaps with what follows it
            return
        read = [node for reader in nodes[last:] for node in operands(reader) if node in ending.in_two]
        if ending.roles == self.alike.roles and all(ending.in_two[node] in self.results for node in read):
            self.calls, self.last, self.after = self.calls + 1, ending.in_two, nodes[last:]

    def rolled(self) -> torch.fx.GraphModule:
        root, graph = torch.nn.Module(), torch.fx.Graph()
        name = compat.add_body(root, "microbatch", self._body())
        values: Nodes = {}
        for node in self.before:
            _copy(node, graph, values)
        body = graph.get_attr(name)
        shared = graph.call_function(group, tuple(values[a] for a, _ in self.alike.shared))
        shared.meta = {"val": tuple(compat.node_value(a) for a, _ in self.alike.shared), "custom": _labels("step")}
        state: Any = [values[a] for a, _ in self.alike.carried]
        handed_on = tuple(compat.node_value(b) for _, b in self.alike.carried)
        for i in range(self.calls):
            number = self.missing.first + i
            own = [self._part(pair, i, graph, values) for pair in self.alike.indexed]
            state = graph.call_function(call, (body, state, *own, shared))
            state.meta = {"val": handed_on, "custom": _labels(microbatch(number))}
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
        source: Any = pair[0].args[0]
        number = self.alike.number(pair[0]) + i
        for node in source.users:
            if node.target is operator.getitem and node.args[1] == number and node in values:
                return values[node]
        new = graph.call_function(operator.getitem, (values[source], number))
        new.meta = dict(pair[0].meta)
        return new

    def _take_apart(self, last: torch.fx.Node, graph: torch.fx.Graph, values: Nodes) -> None:
        """Results of the last call, where anything after it reads them."""
        rolled = {*self.alike.one, *self.alike.two, *self.last}
        for node in dict.fromkeys(x for reader in self.after for x in operands(reader) if x in rolled):
            if node not in self.last or self.last[node] not in self.results:
                raise NotAlike(f"{node} is read after its microbatch, and not by the next")
            values[node] = graph.call_function(operator.getitem, (last, self.results[self.last[node]]))
            values[node].meta = dict(node.meta)

    def _body(self) -> torch.fx.GraphModule:
        graph, inputs = torch.fx.Graph(), dict[Pair, torch.fx.Node]()
        for i, pair in enumerate((*self.alike.carried, *self.alike.indexed, *self.alike.shared)):
            inputs[pair] = graph.placeholder(f"in{i}")
            inputs[pair].meta = {k: v for k, v in pair[0].meta.items() if k in ("val", "sharding")}
        values: Nodes = {}
        for x, y in zip(self.alike.one, self.alike.two, strict=True):
            pairs = iter(zip(operands(x), operands(y), strict=True))

            def inside(_: torch.fx.Node, pairs: Iterator[Pair] = pairs) -> torch.fx.Node:
                pair = next(pairs)
                return inputs[pair] if pair in inputs else values[pair[0]]

            args, kwargs = torch.fx.node.map_arg((x.args, x.kwargs), inside)
            values[x] = graph.create_node(x.op, x.target, args, kwargs, x.name, x.type)
            scope = ir.place_of(x).in_microbatch(None)
            values[x].meta = {**x.meta, "custom": {**compat.labels(x), "scope": scope}}
        graph.output([values[b] for _, b in self.alike.carried])
        return compat.graph_module(torch.nn.Module(), graph)


def _ends(nodes: list[torch.fx.Node], first: int) -> list[int]:
    """Where four microbatches end: behind the last op of each. The next may have begun before."""
    last = {ir.place_of(node).microbatch: i for i, node in enumerate(nodes) if node.op == "call_function"}
    return [last.get(number, -1) + 1 for number in range(first, first + 4)]


def _copy(node: torch.fx.Node, graph: torch.fx.Graph, values: Nodes) -> torch.fx.Node:
    values[node] = new = graph.node_copy(node, values.__getitem__)
    new.meta = dict(node.meta)
    return new


def _labels(scope: str) -> dict[str, str]:
    return {"scope": scope, "phase": "forward", "source": ""}
