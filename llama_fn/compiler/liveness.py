"""How much memory a graph takes over its ops, in their order, from shapes alone.

A value is born at its op and dies after its last use. A body that is called owns what it reads for the last time, and
frees it inside; how much it takes besides is worked out once for all calls that own the same of their operands.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.registry import tensor_bytes
from kernels.repeat import group
from llama_fn.compat import node_value
from llama_fn.compiler import calls, ir
from llama_fn.compiler.cost import is_view, scratch_of

Storage = tuple[torch.fx.Node, int]  # the op that made it, and which of its results


@dataclass(frozen=True)
class Memory:
    """arguments: inputs of the graph; results: outputs that take no donated buffer; temporaries: the most that lives
    between; peak: the most of all together, reached at `peak_at` (op and scope)."""

    argument_bytes: int
    result_bytes: int
    temporary_bytes: int
    peak_bytes: int
    peak_at: str


@dataclass(frozen=True)
class Moment:
    """The most that lives while one op of a graph runs, what it calls included; `at`: op and scope."""

    node: torch.fx.Node
    bytes: int
    at: str


def memory_analysis(gm: torch.fx.GraphModule, aliases: Sequence[tuple[int, int]]) -> Memory:
    """Liveness over the graph in its order."""
    base = tensor_bytes([node_value(node) for node in ir.placeholders(gm.graph)])
    most = max(moments(gm), key=lambda moment: moment.bytes, default=None)
    peak, peak_at = (most.bytes, most.at) if most is not None and most.bytes else (0, "")
    donated = {o for _, o in aliases}
    out = [x for o, x in enumerate(ir.results(gm.graph)) if o not in donated]
    return Memory(base, tensor_bytes([node_value(x) for x in out]), peak, base + peak, peak_at)


def live_bytes(gm: torch.fx.GraphModule) -> list[int]:
    """Bytes of temporaries that live while each op of the graph runs, in its order."""
    return [moment.bytes for moment in moments(gm)]


def moments(gm: torch.fx.GraphModule) -> list[Moment]:
    """What lives over the ops of the graph, in its order, inputs apart."""
    return _Walk({}).moments(gm, frozenset(), "")


class _Walk:
    """`known`: of a body by the inputs that it owns, the most that lives in it beyond what lived before."""

    def __init__(self, known: dict[tuple[torch.fx.GraphModule, frozenset[int]], Moment | None]) -> None:
        self.known = known

    def moments(self, gm: torch.fx.GraphModule, owned: frozenset[int], within: str) -> list[Moment]:
        """`owned`: positions of the inputs that die where they are read last, and lived before."""
        life = _Lifetimes(gm.graph)
        given = ir.placeholders(gm.graph)
        life.born |= {(given[i], 0): tensor_bytes(node_value(given[i])) for i in owned}
        dying: dict[torch.fx.Node, list[Storage]] = defaultdict(list)
        for storage, user in life.last.items():
            dying[user].append(storage)
        live, over_time = 0, list[Moment]()
        for node in ir.calls(gm.graph):
            scope = calls.joined(within, ir.scope_of(node))
            born = sum(life.born.get(storage, 0) for storage in life.made_by(node))
            if calls.is_call(node):
                inner = self._inside(gm, node, life, set(dying[node]), scope)
                most = Moment(node, live + inner.bytes, inner.at) if inner else Moment(node, live, "")
            else:
                most = Moment(node, live + born + scratch_of(node), f"{node.target} in {scope}")
            over_time.append(most)
            live += born - sum(life.born.get(storage, 0) for storage in dying[node])
        return over_time

    def _inside(
        self, gm: torch.fx.GraphModule, node: torch.fx.Node, life: _Lifetimes, dying: set[Storage], scope: str
    ) -> Moment | None:
        """The most that lives in a body beyond what lives when it is called."""
        body = calls.body_of(gm, node)
        operands = [storage for arg in node.args[1:] for storage in life.held_by(arg)]
        owned = frozenset(i for i, storage in enumerate(operands) if storage in dying and operands.count(storage) == 1)
        if (body, owned) not in self.known:
            inner = self.moments(body, owned, scope)
            self.known[body, owned] = max(inner, key=lambda moment: moment.bytes, default=None)
        return self.known[body, owned]


class _Lifetimes:
    """The storages of a graph: `born` their bytes, inputs apart, and `last` the op after which none of the values in it
    is read."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.born: dict[Storage, int] = {}
        self.last: dict[Storage, torch.fx.Node] = {}
        self._held: dict[torch.fx.Node, list[Storage]] = {}
        for node in graph.nodes:
            self._held[node] = self._storages(node)
            self.last |= {storage: node for storage in self.made_by(node)}  # of what nobody reads
            for used in node.all_input_nodes:
                if node.target is not group:  # that only names values for calls
                    self.last |= dict.fromkeys(self._held[used], node)

    def made_by(self, node: torch.fx.Node) -> list[Storage]:
        """Those that an op makes."""
        return [storage for storage in self._held[node] if storage[0] is node and node.op == "call_function"]

    def held_by(self, operand: object) -> list[Storage]:
        """Those of a call's operand, which may be several values."""
        if isinstance(operand, (list, tuple)):
            return [storage for each in operand for storage in self.held_by(each)]
        return self._held[operand] if isinstance(operand, torch.fx.Node) else []

    def _storages(self, node: torch.fx.Node) -> list[Storage]:
        source = node.args[0] if node.args else None
        if node.target is group:
            return self.held_by(node.args)
        if isinstance(source, torch.fx.Node) and (is_view(node) or node.target is torch.ops.aten.copy_.default):
            held = self._held[source]
            if node.target is operator.getitem and (len(held) > 1 or calls.is_call(source)):
                which = held[node.args[1]]  # type: ignore[index]
                return which if isinstance(which, list) else [which]
            return held
        if node.op != "call_function":
            return [(node, 0)]
        value = node_value(node)
        results = value if isinstance(value, (tuple, list)) else [value]
        self.born |= {(node, i): tensor_bytes(result) for i, result in enumerate(results)}
        return [(node, i) for i in range(len(results))]
