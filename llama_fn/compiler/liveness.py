"""How much memory a graph takes over its ops, in their order, from shapes alone."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.registry import tensor_bytes
from llama_fn.compat import node_value
from llama_fn.compiler import calls, ir
from llama_fn.compiler.cost import is_view
from llama_fn.compiler.shorten import shortened


@dataclass(frozen=True)
class Memory:
    """arguments: inputs of the graph; results: outputs that take no donated buffer; temporaries: the most that lives
    between; peak: the most of all together, reached at `peak_at` (op and scope)."""

    argument_bytes: int
    result_bytes: int
    temporary_bytes: int
    peak_bytes: int
    peak_at: str


def memory_analysis(gm: torch.fx.GraphModule, aliases: Sequence[tuple[int, int]]) -> Memory:
    """Liveness over the graph in its order: a value is born at its op and dies after its last use."""
    gm = calls.inlined(shortened(gm)[0])  # calls between take what those left in take
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
    live, over_time = 0, []
    for node in ir.calls(gm.graph):
        live += sum(life.born.get(storage, 0) for storage in life.made_by(node))
        over_time.append(live)
        live -= dying[node]
    return over_time


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
