"""What remat keeps and recomputes: the policy that a user asks for, and the marked regions of a graph.

A region is what `transforms.remat` marked in the model, most often one layer of one microbatch.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch

from llama_fn import compat
from llama_fn.compiler import ir


@dataclass(frozen=True)
class Remat:
    """What to keep: `policy` none, full, dots, names or budget; `names` for names; `budget_bytes` that the layers of
    one microbatch may keep on a device, for budget; `gathers`: gather weights anew for the backward (regather.py)."""

    policy: str = "none"
    names: tuple[str, ...] = ()
    budget_bytes: int = 0
    gathers: bool = False


@dataclass
class RematRegion:
    """Ops of one region, in order: `forward` is a dict for its order and quick lookup."""

    forward: dict[torch.fx.Node, None] = field(default_factory=dict)
    backward: list[torch.fx.Node] = field(default_factory=list)
    forward_pass: int = 0  # regions whose forwards all run before the backward of any share one

    def needed(self, kept: set[torch.fx.Node]) -> dict[torch.fx.Node, None]:
        """The forward ops to run again, if the values `kept` are there."""
        copies: dict[torch.fx.Node, None] = {}
        todo = [operand for node in self.backward for operand in ir.operands(node)]
        while todo:
            node = todo.pop()
            if node in self.forward and node not in copies and not _is_kept(node, kept) and ir.operands(node):
                copies[node] = None
                todo += ir.operands(node)
        return copies

    def first_gradient(self, order: dict[torch.fx.Node, int]) -> torch.fx.Node | None:
        """The gradient that the backward begins with."""
        inside = set(self.backward)
        for node in self.backward:
            entering = [x for x in ir.operands(node) if ir.phase_of(x) == "backward" and x not in inside]
            if entering:
                return max(entering, key=order.__getitem__)
        return None


def regions(graph: torch.fx.Graph) -> dict[str, RematRegion]:
    """By name, in the order of their forwards."""
    regions: dict[str, RematRegion] = {}
    forward_pass, closing = 0, False
    for node in ir.calls(graph):
        name = str(compat.labels(node).get("region", ""))
        if not name:
            continue
        if ir.phase_of(node) == "backward":
            closing = True
            regions[name].backward.append(node)
            continue
        if name not in regions:
            forward_pass, closing = forward_pass + closing, False
            regions[name] = RematRegion(forward_pass=forward_pass)
        regions[name].forward[node] = None
    return regions


def _is_kept(node: torch.fx.Node, kept: set[torch.fx.Node]) -> bool:
    """Also what is one of several results of an op that another result is kept of: they are small beside it."""
    siblings = node.args[0].users if node.target is operator.getitem else ()  # type: ignore[union-attr]
    return node in kept or any(sibling in kept for sibling in siblings)
