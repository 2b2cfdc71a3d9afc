"""Give every op a scope.

Ops that the autograd engine makes by itself (sums of several gradients of one value, gradients of plain pointwise
ops) carry the phase but no scope and no line: they take both from the backward op that produced their latest operand.

    %g = add(%d1, %d2)  # backward   ->   %g = add(%d1, %d2)  # backward layers/3/mlp llama.py:105
"""

from __future__ import annotations

from typing import Any

import torch

from llama_fn.compat import labels
from llama_fn.compiler import ir


def scopes(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with scope, phase and source on every op; in a body, whose scopes are relative to its calls', "" is one."""
    for body in ir.subgraphs(gm):
        _label(body.graph, "")
    _label(gm.graph, "step")
    return gm


def _label(graph: torch.fx.Graph, default: str) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in ir.calls(graph):
        here = {"scope": "", "phase": "forward", "source": "", **labels(node)}
        engine_made = here["phase"] == "backward" and not here["source"]
        producers = [n for n in node.all_input_nodes if ir.phase_of(n) == here["phase"] and ir.scope_of(n)]
        if (engine_made or not here["scope"]) and producers:
            latest = labels(max(producers, key=order.__getitem__))
            taken = ("scope", "region") if here["source"] else ("scope", "region", "source")
            here |= {key: latest.get(key, "") for key in taken}
        node.meta["custom"] = {**here, "scope": here["scope"] or default}
