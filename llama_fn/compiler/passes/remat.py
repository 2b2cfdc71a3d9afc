"""Compute values again in the backward instead of keeping them from the forward (Chen et al. 2016).

    %n = rms_norm(%x, %w)              # forward         %n = rms_norm(%x, %w)              # forward
    %h = einsum("btd,df->btf", %n, %u) # forward         %h = einsum("btd,df->btf", %n, %u) # forward
    ...                                            ->    ...
    %g = einsum("btd,btf->df", %n, %d) # backward        %b = barrier(%x, %d)               # backward
                                                         %m = rms_norm(%b, %w)              # backward: recomputed
                                                         %g = einsum("btd,btf->df", %m, %d) # backward

Of each region that `remat` marks in the model, a policy says what is kept: nothing (full), the results of matrix
products (dots), values named by checkpoint_name (names), or what saves most for its bytes (budget, remat_policy.py).
What a region reads is always kept. Every recomputed op waits, through a barrier, for the gradient that enters the
region's backward. The same ops run on the same values: numbers do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.barrier import barrier
from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.compiler.passes.remat_policy import kept_values
from llama_fn.compiler.passes.remat_regions import RematRegion, regions

RECOMPUTED = "recomputed"  # the note on ops that this pass makes


def remat(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with values computed again in the backward as ctx.remat says."""
    if ctx.remat.policy == "none":
        return gm
    marked = regions(gm.graph)
    kept = kept_values(list(marked.values()), ctx.remat)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for region in marked.values():
        _Recomputation(gm.graph, region, kept, region.first_gradient(order)).insert()
    return gm


class _Recomputation:
    """Puts the ops that a region runs again before their first readers in its backward."""

    def __init__(
        self, graph: torch.fx.Graph, region: RematRegion, kept: set[torch.fx.Node], first_gradient: torch.fx.Node | None
    ) -> None:
        self.graph, self.region, self.first_gradient = graph, region, first_gradient
        self.todo = region.needed(kept)
        self.again: dict[torch.fx.Node, torch.fx.Node] = {}
        self.held_back: dict[torch.fx.Node, torch.fx.Node] = {}  # kept values, behind their barriers

    def insert(self) -> None:
        for node in self.region.backward:
            with self.graph.inserting_before(node):
                node.args, node.kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._value)

    def _value(self, node: torch.fx.Node) -> torch.fx.Node:
        if node not in self.todo:
            return node
        if node not in self.again:
            operands = {operand: self._value(operand) for operand in ir.operands(node)}
            if not any(operand in self.todo for operand in operands) and self.first_gradient is not None:
                first = next(iter(operands))
                operands[first] = self._behind_barrier(first, node)
            new = self.graph.node_copy(node, operands.__getitem__)
            new.meta["custom"] = {**compat.labels(node), "phase": "backward", "note": RECOMPUTED, ir.MADE_BY: "remat"}
            self.again[node] = new
        return self.again[node]

    def _behind_barrier(self, kept: torch.fx.Node, reader: torch.fx.Node) -> torch.fx.Node:
        if kept not in self.held_back:
            new = self.graph.call_function(barrier.op, (kept, self.first_gradient))
            new.meta["val"] = compat.node_value(kept)
            new.meta["custom"] = {**compat.labels(reader), "phase": "backward"}
            self.held_back[kept] = new
        return self.held_back[kept]


def recomputed(graph: torch.fx.Graph) -> Iterator[torch.fx.Node]:
    """The ops of a lowered graph that repeat one of its forward."""
    return (node for node in ir.calls(graph) if compat.labels(node).get("note") == RECOMPUTED)
