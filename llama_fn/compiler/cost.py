"""What a step graph costs: matrix FLOPs, bytes moved, and live memory over the graph, from shapes alone."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.barrier import barrier
from kernels.registry import of_node, tensor_bytes
from llama_fn.compat import node_value
from llama_fn.compiler import ir
from llama_fn.config import ModelConfig
from sharding import collectives_table
from sharding.collectives import wait

VIEWS = (operator.getitem, barrier.op, torch.ops.aten.unbind.int, torch.ops.aten.view.default)


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


def moved(node: torch.fx.Node) -> int:
    """Bytes of HBM that an op reads and writes, each operand once; none for views and for what goes over links."""
    if is_view(node) or collectives_table.kind_of(node):
        return 0
    return tensor_bytes([node_value(n) for n in ir.operands(node)]) + tensor_bytes(node_value(node))


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
    return node.target in VIEWS


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
    life = _Lifetimes(gm.graph)
    dying: dict[torch.fx.Node, int] = defaultdict(int)
    for storage, user in life.last.items():
        dying[user] += life.born.get(storage, 0)
    live, found = 0, []
    for node in ir.calls(gm.graph):
        live += sum(life.born.get(storage, 0) for storage in life.made_by(node))
        found.append(live)
        live -= dying[node]
    return found


class _Lifetimes:
    """The storages of a graph, a (node, index of its result) each: `born` their bytes, inputs apart, and `last` the op
    after which none of the values in it is read."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.born: dict[tuple[torch.fx.Node, int], int] = {}
        self.last: dict[tuple[torch.fx.Node, int], torch.fx.Node] = {}
        self._held: dict[torch.fx.Node, list[tuple[torch.fx.Node, int]]] = {}
        for node in graph.nodes:
            self._held[node] = self._storages(node)
            for used in node.all_input_nodes:
                self.last |= dict.fromkeys(self._held[used], node)

    def made_by(self, node: torch.fx.Node) -> list[tuple[torch.fx.Node, int]]:
        return [storage for storage in self._held[node] if storage[0] is node]

    def _storages(self, node: torch.fx.Node) -> list[tuple[torch.fx.Node, int]]:
        source = node.args[0] if node.args else None
        if isinstance(source, torch.fx.Node) and (is_view(node) or node.target is torch.ops.aten.copy_.default):
            held = self._held[source]
            one_of_several = node.target is operator.getitem and len(held) > 1
            return [held[node.args[1]]] if one_of_several else held  # type: ignore[index]
        if node.op != "call_function":
            return [(node, 0)]
        value = node_value(node)
        results = value if isinstance(value, (tuple, list)) else [value]
        self.born |= {(node, i): tensor_bytes(result) for i, result in enumerate(results)}
        return [(node, i) for i in range(len(results))]


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
