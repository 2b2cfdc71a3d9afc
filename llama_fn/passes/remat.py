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

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.barrier import barrier
from llama_fn import compat, ir
from llama_fn.passes import remat_policy

RECOMPUTED = "recomputed"  # the note on ops that this pass makes


@dataclass(frozen=True)
class Remat:
    """What to keep: `policy` none, full, dots, names or budget; `names` for names; `budget_bytes` that the layers of
    one microbatch may keep on a device, for budget; `gathers`: gather weights anew for the backward (regather.py)."""

    policy: str = "none"
    names: tuple[str, ...] = ()
    budget_bytes: int = 0
    gathers: bool = False


@dataclass
class Region:
    """Ops of one region, in order: `forward` is a dict for its order and quick lookup."""

    forward: dict[torch.fx.Node, None] = field(default_factory=dict)
    backward: list[torch.fx.Node] = field(default_factory=list)
    wave: int = 0  # regions whose forwards all run before the backward of any share one

    def needed(self, kept: set[torch.fx.Node]) -> dict[torch.fx.Node, None]:
        """The forward ops to run again, if the values `kept` are there."""
        found: dict[torch.fx.Node, None] = {}
        todo = [operand for node in self.backward for operand in ir.operands(node)]
        while todo:
            node = todo.pop()
            if node in self.forward and node not in found and not _is_kept(node, kept) and ir.operands(node):
                found[node] = None
                todo += ir.operands(node)
        return found

    def arrival(self, order: dict[torch.fx.Node, int]) -> torch.fx.Node | None:
        """The gradient that the backward begins with."""
        inside = set(self.backward)
        for node in self.backward:
            entering = [x for x in ir.operands(node) if ir.phase_of(x) == "backward" and x not in inside]
            if entering:
                return max(entering, key=order.__getitem__)
        return None


def remat(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    if ctx.remat.policy == "none":
        return gm
    found = regions(gm.graph)
    kept = remat_policy.kept(list(found.values()), ctx.remat)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for region in found.values():
        _Recomputation(gm.graph, region, kept, region.arrival(order)).insert()
    return gm


def regions(graph: torch.fx.Graph) -> dict[str, Region]:
    """By name, in the order of their forwards."""
    found: dict[str, Region] = {}
    wave, closing = 0, False
    for node in ir.calls(graph):
        name = str(compat.labels(node).get("region", ""))
        if not name:
            continue
        if ir.phase_of(node) == "backward":
            closing = True
            found[name].backward.append(node)
            continue
        if name not in found:
            wave, closing = wave + closing, False
            found[name] = Region(wave=wave)
        found[name].forward[node] = None
    return found


def _is_kept(node: torch.fx.Node, kept: set[torch.fx.Node]) -> bool:
    """Also what is one of several results of an op that another result is kept of: they are small beside it."""
    siblings = node.args[0].users if node.target is operator.getitem else ()  # type: ignore[union-attr]
    return node in kept or any(sibling in kept for sibling in siblings)


class _Recomputation:
    """Puts the ops that a region runs again before their first readers in its backward."""

    def __init__(
        self, graph: torch.fx.Graph, region: Region, kept: set[torch.fx.Node], arrival: torch.fx.Node | None
    ) -> None:
        self.graph, self.region, self.arrival = graph, region, arrival
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
            if not any(operand in self.todo for operand in operands) and self.arrival is not None:
                first = next(iter(operands))
                operands[first] = self._behind_barrier(first, node)
            new = self.graph.node_copy(node, operands.__getitem__)
            new.meta["custom"] = {**compat.labels(node), "phase": "backward", "note": RECOMPUTED}
            self.again[node] = new
        return self.again[node]

    def _behind_barrier(self, kept: torch.fx.Node, reader: torch.fx.Node) -> torch.fx.Node:
        if kept not in self.held_back:
            new = self.graph.call_function(barrier.op, (kept, self.arrival))
            new.meta["val"] = compat.node_value(kept)
            new.meta["custom"] = {**compat.labels(reader), "phase": "backward"}
            self.held_back[kept] = new
        return self.held_back[kept]


def recomputed(graph: torch.fx.Graph) -> Iterator[torch.fx.Node]:
    """The ops of a lowered graph that repeat one of its forward."""
    return (node for node in ir.calls(graph) if compat.labels(node).get("note") == RECOMPUTED)
