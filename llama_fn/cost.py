"""What a step graph costs: matrix FLOPs, bytes moved, and live memory over the graph, from shapes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.registry import of_node, tensor_bytes
from llama_fn import ir
from llama_fn.compat import node_value
from llama_fn.config import ModelConfig
from sharding.collectives import wait


@dataclass(frozen=True)
class Cost:
    """flops of matrix products by phase, bytes if every op reads and writes memory once, and ops counted by name."""

    flops: dict[str, int]
    bytes: int
    ops: dict[str, int]

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


@dataclass(frozen=True)
class Memory:
    """arguments: inputs of the graph; results: outputs that take no donated buffer; temporaries: the most that lives
    between; peak: the most of all together, reached at `peak_at` (op and scope)."""

    argument_bytes: int
    result_bytes: int
    temporary_bytes: int
    peak_bytes: int
    peak_at: str


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
    record = of_node(node.target)
    return 0 if record is None else record.flops(*_values(node.args))


def cost_analysis(gm: torch.fx.GraphModule) -> Cost:
    flops: dict[str, int] = dict.fromkeys(ir.PHASES, 0)
    ops: dict[str, int] = defaultdict(int)
    moved = 0
    for node in ir.calls(gm.graph):
        ops[str(node.target)] += 1
        if is_view(node):
            continue
        moved += tensor_bytes(_values(node.args)) + tensor_bytes(node_value(node))
        flops[ir.phase_of(node)] += flops_of(node)
    return Cost(flops, moved, dict(sorted(ops.items())))


def is_view(node: torch.fx.Node) -> bool:
    """Whether a node's result lives in its operand's memory."""
    if node.target is wait.op:
        return bool(node.args[3] == 0)
    return node.target is torch.ops.aten.unbind.int or getattr(node.target, "__name__", "") == "getitem"


def memory_analysis(gm: torch.fx.GraphModule, aliases: Sequence[tuple[int, int]]) -> Memory:
    """Liveness over the graph in its order: a value is born at its op and dies after its last use."""
    base = tensor_bytes([node_value(node) for node in ir.placeholders(gm.graph)])
    live = live_bytes(gm)
    peak = max(live, default=0)
    node = ir.calls(gm.graph)[live.index(peak)] if peak else None
    peak_at = "" if node is None else f"{node.target} in {ir.scope_of(node)}"
    donated = {o for _, o in aliases}
    out = [x for o, x in enumerate(ir.results(gm.graph)) if o not in donated]
    return Memory(base, tensor_bytes([node_value(x) for x in out]), peak, base + peak, peak_at)


def live_bytes(gm: torch.fx.GraphModule) -> list[int]:
    """Bytes of temporaries that live while each op of the graph runs, in its order."""
    owner: dict[torch.fx.Node, torch.fx.Node] = {}
    last: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in gm.graph.nodes:
        shares = node.args[0] if is_view(node) or node.target is torch.ops.aten.copy_.default else None
        owner[node] = owner[shares] if isinstance(shares, torch.fx.Node) else node
        for used in node.all_input_nodes:
            last[owner[used]] = node
    dying: dict[torch.fx.Node, list[torch.fx.Node]] = defaultdict(list)
    for value, user in last.items():
        if value.op == "call_function":
            dying[user].append(value)
    live, found = 0, []
    for node in ir.calls(gm.graph):
        if owner[node] is node:
            live += tensor_bytes(node_value(node))
        found.append(live)
        live -= sum(tensor_bytes(node_value(value)) for value in dying[node])
    return found


def hardware_flops_per_token(m: ModelConfig, seq_len: int, recompute: bool) -> float:
    """AscendSpeed's count, 24 c L h^2 (1 + s/(6h) + V/(16 L h)) with c = 4 under full recompute, else 3.

    It takes F = 8h/3, MHA and uncut attention, so it is a convention for comparing runs, not a measurement.
    """
    c, h = (4 if recompute else 3), m.embed_dim
    return 24 * c * m.num_layers * h**2 * (1 + seq_len / (6 * h) + m.vocab_size / (16 * m.num_layers * h))


def model_flops_per_token(m: ModelConfig, seq_len: int) -> float:
    """For MFU: 6 per matrix parameter, and causal attention at half (6 N H s per layer), forward and backward."""
    d, h = m.embed_dim, m.head_dim
    per_layer = 2 * d * m.num_heads * h + 2 * d * m.num_kv_heads * h + 3 * d * m.mlp_dim
    matrices = m.num_layers * per_layer + m.vocab_size * d
    return 6 * matrices + 6 * m.num_heads * h * seq_len * m.num_layers
