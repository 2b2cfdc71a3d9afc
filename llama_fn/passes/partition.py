"""From the global graph to the graph of one device.

On one device every sharding annotation is the identity and goes away:

    %y = constrain(%x, "batch,seq,embed")
    %z = mul(%y, 2)                          ->   %z = mul(%x, 2)
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.registry import of_node
from llama_fn import ir
from llama_fn.errors import UserError


def partition(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    if ctx.mesh.size > 1:
        raise UserError(f"mesh {ctx.mesh} has {ctx.mesh.size} devices; this version partitions for one device only")
    for node in ir.calls(gm.graph):
        record = of_node(node.target)
        if record is not None and record.name in ("constrain", "reshard_as"):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
    return gm
