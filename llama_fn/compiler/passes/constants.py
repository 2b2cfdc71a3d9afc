"""What depends on no input is computed once, at the top.

    %m0 = triu(ones(2048, 2048), 1)   # layers/0        %m0 = triu(ones(2048, 2048), 1)  # constants
    %o0 = attention(..., %m0)                     ->    %o0 = attention(..., %m0)
    %m1 = triu(ones(2048, 2048), 1)   # layers/1        %o1 = attention(..., %m0)
    %o1 = attention(..., %m1)

Written by kernels for themselves: the causal mask, the rotary angles. Not merged: anything that an input reaches, so no
recomputed activation becomes its original, and nothing that writes.
"""

from __future__ import annotations

from typing import Any

import torch

from llama_fn import compat
from llama_fn.compiler import ir
from sharding.messages import is_message

SCOPE = "constants"


def constants(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with one copy of each value that depends on no input, at its beginning."""
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    made: dict[str, torch.fx.Node] = {}

    def copy(node: torch.fx.Node) -> torch.fx.Node:
        new = graph.node_copy(node, values.__getitem__)
        new.meta = dict(node.meta)
        return new

    for node in ir.placeholders(gm.graph):
        values[node] = copy(node)
    for node in _constant(gm.graph):
        key = f"{node.target} {torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)}"
        if key not in made:
            made[key] = copy(node)
            made[key].meta["custom"] = {"scope": SCOPE, "phase": "forward", "source": ""}
        values[node] = made[key]
    for node in gm.graph.nodes:
        if node not in values:
            values[node] = copy(node)
    return compat.graph_module(gm, graph)


def _constant(graph: torch.fx.Graph) -> dict[torch.fx.Node, None]:
    """Ops with one result that depend on no input and write nothing, in order. Not what other devices take part in: it
    stays where they come to it."""
    constant: dict[torch.fx.Node, None] = {}
    for node in ir.calls(graph):
        writes = getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        several = isinstance(compat.node_value(node), (tuple, list))
        together = is_message(node) or compat.is_collective(node.target)
        if not writes and not several and not together and constant.keys() >= set(ir.operands(node)):
            constant[node] = None
    return constant
