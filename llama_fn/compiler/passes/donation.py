"""Write donated results into the buffers of the arguments they replace.

    return %new, %loss   ->   copy_(%old, %new)
                              return %loss

All copies stand at the end, after every read of an old value; results that are inputs themselves are cloned first,
the ones that are returned as well: a loss scale that is reported must not be the one just written.
"""

from __future__ import annotations

from typing import Any

import torch

from llama_fn.compat import node_value
from llama_fn.compiler import ir

CLONE = torch.ops.aten.clone.default


def donation(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with the new value of each donated input copied into it at the end."""
    if not ctx.aliases:
        return gm
    inputs, out = ir.placeholders(gm.graph), ir.output_node(gm.graph)
    flat = ir.results(gm.graph)
    pairs = [(inputs[i], flat[o]) for i, o in ctx.aliases if inputs[i] is not flat[o]]
    kept = [o for o in range(len(flat)) if o not in {o for _, o in ctx.aliases}]
    made: list[torch.fx.Node] = []
    with gm.graph.inserting_before(out):
        for _, new in pairs:
            if new.op == "placeholder" or new in made:
                new = _call(gm, CLONE, (new,), new)
            made.append(new)
        results = [_call(gm, CLONE, (x,), x) if x.op == "placeholder" else x for x in (flat[o] for o in kept)]
        for (old, _), new in zip(pairs, made, strict=True):
            _call(gm, torch.ops.aten.copy_.default, (old, new), new)
    out.args = (results,)
    out.meta["paths"] = tuple(out.meta["paths"][o] for o in kept)
    return gm


def _call(gm: torch.fx.GraphModule, op: Any, args: tuple[Any, ...], like: torch.fx.Node) -> torch.fx.Node:
    node = gm.graph.call_function(op, args)
    node.meta["val"] = node_value(like)
    node.meta["custom"] = {"scope": "donation", "phase": "optimizer", "source": ""}
    return node
