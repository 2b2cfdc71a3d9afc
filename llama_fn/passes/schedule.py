"""Where collectives stand: weights are gathered one layer ahead of their use, gradients reduced as soon as they exist.

    gather layers/0, 1, 2, ...     gather layers/0
    layers/0 forward               gather layers/1
    layers/1 forward         ->    layers/0 forward
    ...                            gather layers/2
                                   layers/1 forward
                                   ...

As traced, every weight is gathered before the first layer and every gradient reduced after the last: the first layer
would wait for all of them, and nothing could overlap. The order of everything else stays, and so do the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from llama_fn import ir

_LAYER = re.compile(r"^(?:microbatch/\d+/)?layers/(\d+)(?:/|$)")
_GATHER = re.compile(r"^gather/layers/(\d+)(?:/|$)")


def schedule(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    if ctx.mesh.size == 1:
        return gm
    order = list(_Order(gm.graph))
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in order:
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = node.meta
    return torch.fx.GraphModule(gm, graph)


class _Order:
    """The nodes of a graph in their new order."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.done: set[torch.fx.Node] = set()
        self.gathers: dict[int, list[torch.fx.Node]] = {}
        for node in self.nodes:
            match = _GATHER.match(ir.scope_of(node))
            if match:
                self.gathers.setdefault(int(match[1]), []).append(node)
        self.waiting = [node for node in self.nodes if _is_reduction(node)]

    def __iter__(self) -> Iterator[torch.fx.Node]:
        late = {node for nodes in self.gathers.values() for node in nodes} | set(self.waiting)
        region = ""
        for node in self.nodes:
            if node in late:
                continue
            match = _LAYER.match(ir.scope_of(node))
            here = f"{match.group() if match else ''} {ir.phase_of(node)}"
            if here != region:
                region = here
                yield from self._ready()
                if match and ir.phase_of(node) == "forward":
                    for layer in (int(match[1]), int(match[1]) + 1):
                        for gather in self.gathers.get(layer, ()):
                            yield from self._with_operands(gather)
            yield from self._with_operands(node)

    def _with_operands(self, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
        if node in self.done:
            return
        for operand in node.all_input_nodes:
            yield from self._with_operands(operand)
        self.done.add(node)
        yield node

    def _ready(self) -> Iterator[torch.fx.Node]:
        """Reductions of gradients that are complete. Called between layers, whose ops stay together."""
        left = []
        for node in self.waiting:
            if all(operand in self.done for operand in node.all_input_nodes):
                yield from self._with_operands(node)
            else:
                left.append(node)
        self.waiting = left


def _is_reduction(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and ir.scope_of(node).startswith("reduce/")
