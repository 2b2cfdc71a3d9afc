"""The graph of a body: what a part computes of one microbatch, forward or back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.compiler.pipeline.cut import Body, Cut
from sharding.schedules import FORWARD

Node = torch.fx.Node


class BodyWriter:
    """Writes the graph of a body."""

    def __init__(self, cut: Cut, body: Body) -> None:
        self.cut, self.body = cut, body
        self.graph = torch.fx.Graph()
        self.values: dict[Node, Node] = {}

    def written(self) -> torch.fx.GraphModule:
        """The graph: inputs in the order of a call's operands, results in that of Body.results."""
        body, part = self.body, self.body.part
        for node in self._inputs():
            new = self.graph.placeholder(node.name)
            new.meta = {key: value for key, value in node.meta.items() if key in ("val", "sharding")}
            self.values[node] = new
        for node in body.ops:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[self.cut.on(n, part)])
            new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
            scope = ir.place_of(node).in_microbatch(None)
            region = str(compat.labels(node).get("region", "")) and scope
            # A backward also makes some forward values anew.
            where = {**compat.labels(node), "scope": scope, "region": region, "phase": phase_of(body)}
            new.meta = {**node.meta, "custom": where}
            self.values[node] = new
        self.graph.output([self.values[self.cut.on(node, part)] for node in body.results])
        return compat.graph_module(torch.nn.Module(), self.graph)

    def _inputs(self) -> Iterator[Node]:
        """In the order of a call's operands."""
        yield from (*self.body.received, *self.body.again, *self.body.own)
        for earlier in self.body.earlier.values():
            yield from earlier.kept
        if self.cut.first:
            yield from (self.cut.carried[node] for node in self.body.sums)
        yield from self.body.shared


def phase_of(body: Body) -> str:
    """In which all of its ops are."""
    return "forward" if body.kind == FORWARD else "backward"
