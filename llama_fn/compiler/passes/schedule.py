"""Where collectives stand: started as soon as they can be, waited for where their result is needed.

    gather layers/0, 1, 2, ...     gather layers/0           start
    layers/0 forward               gather layers/1           start
    layers/1 forward         ->    layers/0 forward          waits for its gathers
    ...                            gather layers/2           start
                                   layers/1 forward          waits for its gathers
                                   ...

As traced, every weight is gathered before the first layer and every gradient reduced after the last: the first layer
would wait for all of them, and nothing could overlap. Here weights are gathered one layer ahead, a layer's gradients
are added to those of earlier microbatches and reduced while the next layer's are computed, and inside a layer what a
collective needs is computed before what only its neighbours need, which then fills the time until it is done. No value
changes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import torch

from kernels.registry import of_node
from kernels.scope_names import ACCUMULATE, GATHER, REDUCE
from llama_fn.compiler import ir
from sharding.collectives import communicates, wait


def schedule(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` in an order that lets collectives run beside computing."""
    if ctx.mesh.size == 1:
        return gm
    ir.warn_without_layers(ir.calls(gm.graph), "schedule", "every weight is gathered before the first product")
    first, *rest = list(_Order(gm.graph))
    assert first is next(iter(gm.graph.nodes))  # an input
    for node in rest:
        if first.next is not node:
            first.append(node)
        first = node
    return gm


def _region(node: torch.fx.Node) -> str:
    scope = ir.place_of(node)
    return f"{scope.place if scope.is_layer else ''} {ir.phase_of(node)}"


def _is_start(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and bool(communicates(of_node(node.target)))


def _is_reduction(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and ir.place_of(node).role in (REDUCE, ACCUMULATE)


class _Order:
    """The nodes of a graph in their new order."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.done: set[torch.fx.Node] = set()
        # By phase, microbatch, None where one gather serves all of them, group of layers and layer.
        self.gathers: dict[tuple[str, int | None, str, int], list[torch.fx.Node]] = {}
        for node in self.nodes:
            scope = ir.place_of(node)
            if scope.role == GATHER and scope.layer is not None:
                key = (ir.phase_of(node), scope.microbatch, scope.group, scope.layer)
                self.gathers.setdefault(key, []).append(node)
        self.reductions = {node: i for i, node in enumerate(n for n in self.nodes if _is_reduction(n))}
        self.missing = {node: len(node.all_input_nodes) for node in self.reductions}
        self.ready: list[tuple[int, torch.fx.Node]] = []  # a heap of reductions whose operands are all there
        self.started: list[torch.fx.Node] = []  # reductions that stood at the boundary before

    def __iter__(self) -> Iterator[torch.fx.Node]:
        on_demand = {node for nodes in self.gathers.values() for node in nodes} | set(self.reductions)
        on_demand |= {node for node in self.nodes if node.target is wait.op}
        yield from self._all(node for node in self.nodes if node.op == "placeholder")
        region = ""
        held: list[torch.fx.Node] = []
        for node in self.nodes:
            if node in on_demand:
                continue
            if _region(node) != region:
                yield from self._all(held)
                region, held = _region(node), []
                yield from self._boundary(node)
            held.append(node)
            if _is_start(node):
                # Whatever else stands before it runs while it is under way.
                yield from self._with_operands(node)
                yield from self._all(held)
                held = []
        yield from self._all(held)

    def _boundary(self, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
        """Between layers, whose ops stay together: reductions, and the gathers of this layer and the next."""
        yield from self._reduce()
        scope, phase = ir.place_of(node), ir.phase_of(node)
        if not scope.is_layer or scope.layer is None:
            return
        microbatch, group, layer = scope.microbatch, scope.group, scope.layer
        ahead = layer + (1 if phase == "forward" else -1)
        places = [(phase, each, group, number) for number in (layer, ahead) for each in (microbatch, None)]
        if microbatch is not None and ahead < 0:
            places.append(("forward", microbatch + 1, group, 0))
        for place in places:
            yield from self._all(gather for gather in self.gathers.get(place, ()) if _is_start(gather))

    def _reduce(self) -> Iterator[torch.fx.Node]:
        """Wait for the reductions started one layer before, whose operands can then be freed, and start new ones."""
        yield from self._all(self.started)
        self.started = []
        while self.ready:
            _, node = heapq.heappop(self.ready)
            if node not in self.done:
                yield from self._with_operands(node)
                self.started += [user for user in node.users if user.target is wait.op]

    def _all(self, nodes: Any) -> Iterator[torch.fx.Node]:
        for node in nodes:
            yield from self._with_operands(node)

    def _with_operands(self, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
        if node in self.done:
            return
        for operand in node.all_input_nodes:
            yield from self._with_operands(operand)
        self.done.add(node)
        yield node
        for user in node.users:
            if user in self.missing:
                self.missing[user] -= 1
                if not self.missing[user] and user.target is not wait.op:
                    heapq.heappush(self.ready, (self.reductions[user], user))
