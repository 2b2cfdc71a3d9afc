"""What a step graph costs: matrix FLOPs and bytes moved, from shapes alone."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from kernels.barrier import barrier
from kernels.registry import of_node, tensor_bytes
from llama_fn.compat import node_value
from llama_fn.compiler import calls, ir
from sharding import collectives_table
from sharding.collectives import wait
from sharding.messages import received

VIEWS = (operator.getitem, barrier.op, received.op, torch.ops.aten.unbind.int, torch.ops.aten.view.default)


@dataclass(frozen=True)
class Cost:
    """flops of matrix products by phase, bytes if every op reads and writes memory once, and ops counted by name."""

    flops: dict[str, int]
    bytes: int
    ops: dict[str, int]

    @property
    def total_flops(self) -> int:
        """Of all phases."""
        return sum(self.flops.values())


def _values(args: Any) -> list[Any]:
    """Arguments with nodes replaced by their fake values, flat one level."""
    flat: list[Any] = []
    for a in args:
        flat += [_value(x) for x in a] if isinstance(a, (list, tuple)) else [_value(a)]
    return flat


def _value(a: Any) -> Any:
    return node_value(a) if isinstance(a, torch.fx.Node) else a


def flops_of(node: torch.fx.Node) -> int:
    """Floating-point operations of the matrix products inside one op."""
    kernel = of_node(node.target)
    return 0 if kernel is None else kernel.flops(*_values(node.args))


def scratch_of(node: torch.fx.Node) -> int:
    """Bytes that live inside of one op while it runs."""
    kernel = of_node(node.target)
    return 0 if kernel is None else kernel.scratch(*_values(node.args))


def moved(node: torch.fx.Node) -> int:
    """Bytes of HBM that an op reads and writes, each operand once; none for views and for what goes over links."""
    if is_view(node) or collectives_table.kind_of(node):
        return 0
    if node.target is wait.op:  # which puts pieces together; its other operand only has to live until then
        return 2 * tensor_bytes(node_value(node))
    return tensor_bytes([node_value(n) for n in ir.operands(node)]) + tensor_bytes(node_value(node))


def cost_analysis(gm: torch.fx.GraphModule) -> Cost:
    """What the ops of a graph cost, from their shapes."""
    flops: dict[str, int] = dict.fromkeys(ir.PHASES, 0)
    ops: dict[str, int] = defaultdict(int)
    moved = 0
    for node, times in calls.counted(gm):
        ops[str(node.target)] += times
        if is_view(node):
            continue
        moved += times * (tensor_bytes(_values(node.args)) + tensor_bytes(node_value(node)))
        flops[ir.phase_of(node)] += times * flops_of(node)
    return Cost(flops, moved, dict(sorted(ops.items())))


def is_view(node: torch.fx.Node) -> bool:
    """Whether a node's result lives in its operand's memory."""
    if node.target is wait.op:
        return bool(node.args[3] == 0)
    return node.target in VIEWS
