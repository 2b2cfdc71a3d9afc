"""Products in 16 bits, on a CPU that has none, are computed in float32 and rounded once.

    %y = mm(%a, %b)   [bf16]   ->   %c = to(%a, f32)   %d = to(%b, f32)
                                    %z = mm(%c, %d)    %y = to(%z, bf16)

A processor with such instructions adds up in float32 and rounds the sum: these are its numbers. Without them, torch's
own product is six to seventy times slower than the float32 one (2048 x 256 x 688 on a CPU with AVX2 alone: 2.4 and 12.6
GFLOP/s in bf16, by the layout of the second operand, against 105 with the copies counted). Operands with few rows stay
as they are, because there the copies would be most of the work.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from llama_fn import compat
from llama_fn.compiler import ir

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default)
FEWEST_ROWS = 16  # a copy of the other operand costs as much as some ten products of it with a row


def widen(gm: torch.fx.GraphModule, dtypes: frozenset[torch.dtype]) -> torch.fx.GraphModule:
    """`gm`, in plain torch ops, with its products in `dtypes` widened, those of its subgraphs too."""
    for each in (*ir.subgraphs(gm), gm):
        _widen(each, dtypes)
    return gm


def _widen(gm: torch.fx.GraphModule, dtypes: frozenset[torch.dtype]) -> None:
    # Products of one place share the copy of an operand. Those of others do not: it would be held from one to the next.
    wide: dict[tuple[torch.fx.Node, str, str], torch.fx.Node] = {}
    for node in ir.calls(gm.graph):
        target: Any = node.target
        value = compat.node_value(node) if target in PRODUCTS else None
        if value is None or value.dtype not in dtypes or min(value.shape[-2:]) < FEWEST_ROWS:
            continue
        operands = []
        left, right = cast(tuple[torch.fx.Node, torch.fx.Node], node.args)
        for operand in (left, right):
            key = operand, ir.scope_of(node), ir.phase_of(node)
            if key not in wide:
                with gm.graph.inserting_before(node):
                    wide[key] = _cast(gm.graph, operand, torch.float32, node)
            operands.append(wide[key])
        with gm.graph.inserting_before(node):
            product = gm.graph.call_function(target, tuple(operands))
            product.meta["val"] = value.to(torch.float32)
            ir.label(product, node)
            node.replace_all_uses_with(_cast(gm.graph, product, value.dtype, node))
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


def _cast(graph: torch.fx.Graph, x: torch.fx.Node, dtype: torch.dtype, like: torch.fx.Node) -> torch.fx.Node:
    made = graph.call_function(torch.ops.prims.convert_element_type.default, (x, dtype))
    made.meta["val"] = compat.node_value(x).to(dtype)
    ir.label(made, like)
    return made
