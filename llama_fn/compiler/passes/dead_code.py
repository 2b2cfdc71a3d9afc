"""Remove ops whose result nobody uses.

    %a = mul(%x, 2)          %b = add(%x, 1)
    %b = add(%x, 1)     ->   return %b
    return %b

Must not touch inputs, results, or anything that writes.
"""

from __future__ import annotations

from typing import Any

import torch

from llama_fn.compiler import ir


def dead_code(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` without ops whose result nobody reads."""
    for node in reversed(ir.calls(gm.graph)):
        if not node.users and not _writes(node):
            gm.graph.erase_node(node)
    return gm


def _writes(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
