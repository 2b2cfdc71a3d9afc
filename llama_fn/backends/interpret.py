"""interpret: the lowered graph node by node, freeing each value after its last use and counting what is alive.

The oracle for partitioning and for memory; it trains for real, slowly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from kernels.registry import tensor_bytes
from llama_fn import cost, ir
from llama_fn.backends import Executable


def compile(gm: torch.fx.GraphModule) -> Executable:
    interpreter = Interpreter(gm)
    return Executable(interpreter.run, ir.as_text(gm, "interpret"), measured=lambda: interpreter.memory)


class Interpreter:
    """Runs one graph; `memory` holds the live bytes of the last run, from the storages that really existed."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.graph = gm.graph
        self.memory: cost.Memory | None = None
        last: dict[torch.fx.Node, torch.fx.Node] = {used: n for n in self.graph.nodes for used in n.all_input_nodes}
        self.dying: dict[torch.fx.Node, list[torch.fx.Node]] = defaultdict(list)
        for value, user in last.items():
            if user.op != "output":
                self.dying[user].append(value)

    @torch.no_grad()
    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        values: dict[torch.fx.Node, Any] = dict(zip(ir.placeholders(self.graph), inputs, strict=True))
        storages = _Storages(inputs)
        peak, peak_at = 0, ""
        for node in ir.calls(self.graph):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            storages.add(values[node])
            if storages.live > peak:
                peak, peak_at = storages.live, f"{node.target} in {ir.scope_of(node)}"
            for dead in [*self.dying[node], *([] if node.users else [node])]:
                storages.drop(values.pop(dead))
        results = [values[r] for r in ir.results(self.graph)]
        base = tensor_bytes(list(inputs))
        self.memory = cost.Memory(base, tensor_bytes(results), peak, base + peak, peak_at)
        return results


class _Storages:
    """Bytes of the storages that live values hold, inputs apart."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.holders: dict[int, int] = defaultdict(int)
        self.live = 0

    def _each(self, value: Any) -> list[tuple[int, int]]:
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        return [(s.data_ptr(), s.nbytes()) for s in storages if s.nbytes() and s.data_ptr() not in self.inputs]

    def add(self, value: Any) -> None:
        for pointer, size in self._each(value):
            self.live += size * (self.holders[pointer] == 0)
            self.holders[pointer] += 1

    def drop(self, value: Any) -> None:
        for pointer, size in self._each(value):
            self.holders[pointer] -= 1
            self.live -= size * (self.holders[pointer] == 0)
