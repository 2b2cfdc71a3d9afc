"""Split every collective into its start and the wait for it, so that other work can stand between the two.

    %y = all_gather(%x, "data", 4, 1)   ->   %p = all_gather_start(%x, "data", 4, 1)
                                             %y = wait(%p, %x, 4, 1)

The schedule pass moves them apart. Without this pass a device waits where it starts.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.registry import of_node
from llama_fn import compat
from llama_fn.compiler import ir
from sharding.abstract_eval import AbstractEval
from sharding.collectives import STARTS, put_together, wait


def overlap(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with each collective split into its start and the wait for it."""
    for node in ir.calls(gm.graph):
        kernel = of_node(node.target)
        if kernel is None or kernel.name not in STARTS:
            continue
        op: Any = STARTS[kernel.name].op
        x, n = node.args[0], node.args[2]
        with gm.graph.inserting_before(node):
            start = gm.graph.call_function(op, node.args)
            done = gm.graph.call_function(wait.op, (start, x, n, put_together(kernel.name, node.args)))
        start.meta["val"] = AbstractEval.of(compat.node_value(node)).result(op, node.args)
        done.meta["val"] = compat.node_value(node)
        ir.label(start, node)
        ir.label(done, node)
        node.replace_all_uses_with(done)
        gm.graph.erase_node(node)
    return gm
