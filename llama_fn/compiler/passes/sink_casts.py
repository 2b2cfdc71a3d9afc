"""One cast of a stack instead of a stack of casts: half the bytes written where the stack is read with the cast fused.

%b = to(%a, f32)                         %s = stack([%a, %c])
%d = to(%c, f32)                   ->    %t = to(%s, f32)
%s = stack([%b, %d])
"""

from __future__ import annotations

from typing import Any

import torch

from llama_fn import compat
from llama_fn.compiler import ir

aten = torch.ops.aten
CAST = aten._to_copy.default


def sink_casts(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with a stack of casts written as a cast of the stack."""
    for node in ir.calls(gm.graph):
        if node.target is not torch.ops.aten.stack.default:
            continue
        casts: list[torch.fx.Node] = node.args[0]  # type: ignore[assignment]
        if any(cast.target is not CAST or len(cast.users) > 1 for cast in casts):
            continue
        sources: list[Any] = [cast.args[0] for cast in casts]
        if len({compat.node_value(source).dtype for source in sources}) > 1:
            continue
        with gm.graph.inserting_before(node):
            whole = gm.graph.call_function(node.target, (sources, *node.args[1:]))
            cast = gm.graph.call_function(CAST, (whole,), dict(casts[0].kwargs))
        narrow = compat.node_value(sources[0]).dtype
        whole.meta["val"] = compat.node_value(node).to(narrow)
        cast.meta["val"] = compat.node_value(node)
        ir.label(whole, node)
        ir.label(cast, node)
        node.replace_all_uses_with(cast)
        gm.graph.erase_node(node)
    return gm
