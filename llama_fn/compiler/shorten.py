"""A graph of many microbatches as one of a few: what is true of those in the middle is true of each of them.

%c1 = call(%accumulated, [...], %tokens1)       %c1 = call(%accumulated, [...], %tokens1)     # microbatch/1
%c2 = call(%accumulated, %c1, %tokens2)     ->  %c2 = call(%accumulated, %c1, %tokens2)       # microbatch/2
...
%c9 = call(%accumulated, %c8, %tokens9)         %c9 = call(%accumulated, %c2, %tokens9)       # microbatch/3
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from kernels.scope_names import microbatch
from llama_fn import compat
from llama_fn.compiler import calls, ir

ALIKE = 2  # microbatches that stand for those between the first and the last


@dataclass(frozen=True)
class Missing:
    """`calls` microbatches that a graph stands for and lacks, all like `first` and the one after it, which it has."""

    first: int
    calls: int


def shortened(gm: torch.fx.GraphModule, first: int = ALIKE) -> tuple[torch.fx.GraphModule, Missing | None]:
    """`gm`, and what it lacks: of microbatches that call one body in a row, each with the results of the one before,
    the `first` and the last stay, numbered one after the other."""
    row = _row(gm.graph)
    missing = len(row) - first - 1
    if missing <= 0:
        return gm, None
    graph, values = _without(gm, row[first:-1], row[first - 1])
    last = values[row[-1]]
    last.meta["custom"] = {**compat.labels(last), "scope": microbatch(_number(row[-1]) - missing)}
    return compat.graph_module(gm, graph), Missing(_number(row[first - ALIKE]), missing)


def beginning(gm: torch.fx.GraphModule) -> tuple[torch.fx.GraphModule, int]:
    """`gm` with its first two microbatches alone, and how many it has: none of what follows differs from the second."""
    numbers = [ir.place_of(node).microbatch for node in ir.calls(gm.graph)]
    count = 1 + max((n for n in numbers if n is not None), default=-1)
    row = _row(gm.graph)
    if len(row) < 2:
        return gm, count
    graph, _ = _without(gm, row[1:], row[0])
    return compat.graph_module(gm, graph), count


def _without(
    gm: torch.fx.GraphModule, dropped: list[torch.fx.Node], instead: torch.fx.Node
) -> tuple[torch.fx.Graph, dict[torch.fx.Node, torch.fx.Node]]:
    """A copy without some calls, another standing for them, and what stands in it for what."""
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    graph, gone = torch.fx.Graph(), set(dropped)
    for node in gm.graph.nodes:
        if node in gone:
            values[node] = values[instead]
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = copy.copy(node.meta)
    return graph, values


def _row(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The longest row of calls of one body, each of which is read by the next alone, in scopes that number them."""
    rows: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in ir.calls(graph):
        if not calls.is_call(node):
            continue
        before: Any = node.args[1]
        before = before if isinstance(before, torch.fx.Node) and before in rows else None
        follows = before is not None and before.args[0] is node.args[0] and list(before.users) == [node]
        if follows and _number(node) == _number(before) + 1:
            rows[node] = [*rows.pop(before), node]
        elif _number(node) >= 0:
            rows[node] = [node]
    return max(rows.values(), key=len, default=[])


def _number(call: torch.fx.Node) -> int:
    """Of its microbatch, if that is all that its scope says; else -2."""
    scope = ir.place_of(call)
    alone = scope.microbatch is not None and ir.scope_of(call) == microbatch(scope.microbatch)
    return scope.microbatch if alone and scope.microbatch is not None else -2
