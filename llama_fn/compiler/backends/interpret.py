"""interpret: the per-device graph node by node, all devices of the mesh in lockstep inside one process.

Arguments and results are global: each device gets its part, and the parts are put together again. Collectives are
arithmetic between the devices' values. Every value is freed after its last use, and device 0's live bytes are counted.
The oracle for partitioning and for memory; it trains for real, slowly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from kernels.registry import of_node, tensor_bytes
from kernels.repeat import flat
from llama_fn.compiler import calls, finite, ir, liveness
from llama_fn.compiler.backends import Executable, Program
from llama_fn.compiler.ranges import RANGES, name_of
from sharding.simulate import COLLECTIVES, FUSED, join, part


def compile(program: Program, check_finite: bool = False) -> Executable:
    """`check_finite`: finite.NonFinite for the first op whose result is not, on any device."""
    interpreter = Interpreter(program, check_finite)
    run = interpreter.run if program.mesh.size == 1 else interpreter.run_global
    return Executable(run, ir.as_text(program.graph_module, "interpret"), measured=lambda: interpreter.memory)


_Env = dict[torch.fx.Node, Any]  # values of one device


class Interpreter:
    """Runs one graph on every device; `memory` holds device 0's live bytes of the last run, from real storages."""

    def __init__(self, program: Program, check_finite: bool = False) -> None:
        self.program, self.gm, self.check_finite = program, program.graph_module, check_finite
        self.graph = self.gm.graph
        self.memory: liveness.Memory | None = None
        self.dying: dict[torch.fx.Graph, dict[torch.fx.Node, list[torch.fx.Node]]] = {}

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Results of a mesh of one device."""
        return self.lockstep([inputs])[0]

    @torch.no_grad()
    def run_global(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Global results from global inputs, which donated ones of are overwritten."""
        program, ranks = self.program, range(self.program.mesh.size)
        held = [[part(x, p, program.mesh, r) for x, p in zip(inputs, program.inputs, strict=True)] for r in ranks]
        results = self.lockstep(held)
        for i in ir.written(self.graph):
            inputs[i].copy_(join([parts[i] for parts in held], program.inputs[i], program.mesh, inputs[i].shape))
        return [
            join([one[o] for one in results], layout, program.mesh, shape)
            for o, (layout, shape) in enumerate(zip(program.outputs, program.output_shapes, strict=True))
        ]

    @torch.no_grad()
    def lockstep(self, inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Results per device from the inputs per device."""
        if self.check_finite:
            for r, each in enumerate(inputs):
                finite.check_inputs(self.graph, each, f" on device {r}")
        storages = _Storages(inputs[0])
        values = [dict[torch.fx.Node, Any](zip(ir.placeholders(self.graph), each, strict=True)) for each in inputs]
        results = self._run(self.gm, values, storages, "")
        RANGES.to("")
        base = tensor_bytes(list(inputs[0]))
        self.memory = liveness.Memory(
            base, tensor_bytes(results[0]), storages.peak, base + storages.peak, storages.peak_at
        )
        return results

    def _run(
        self, gm: torch.fx.GraphModule, values: list[_Env], storages: _Storages, within: str
    ) -> list[list[torch.Tensor]]:
        """Results of a graph, called in the scope `within`, from its inputs in `values`, one dict for each device."""
        dying = self._dying(gm.graph)
        for node in ir.calls(gm.graph):
            if calls.is_call(node):
                self._call(gm, node, values, storages, dying[node], within)
                continue
            if RANGES.on:
                RANGES.to(name_of(node, within))
            for r, result in enumerate(self._evaluate(node, values)):
                values[r][node] = result
                if self.check_finite:
                    given = [values[r][operand] for operand in ir.operands(node)]
                    finite.check_result(node, result, given, f" on device {r}", within)
            storages.add(values[0][node], f"{node.target} in {calls.joined(within, ir.scope_of(node))}")
            _drop([*dying[node], *([] if node.users else [node])], values, storages)
        return [[mine[r] for r in ir.results(gm.graph)] for mine in values]

    def _call(
        self, gm: torch.fx.GraphModule, node: torch.fx.Node, values: list[_Env], storages: _Storages,
        dying: list[torch.fx.Node], within: str,
    ) -> None:  # fmt: skip
        """Run a body. What it reads for the last time is its own, and freed inside."""
        body, scope = calls.body_of(gm, node), calls.joined(within, ir.scope_of(node))
        inputs = ir.placeholders(body.graph)
        inner: list[_Env] = []
        for mine in values:
            operands = torch.fx.node.map_arg(node.args[1:], mine.__getitem__)
            inner.append(dict(zip(inputs, flat(operands), strict=True)))
            del operands
        for operand in inner[0].values():
            storages.add(operand)
        _drop(dying, values, storages)
        results = self._run(body, inner, storages, scope)
        for mine, each in zip(values, results, strict=True):
            mine[node] = tuple(each)
        storages.add(values[0][node])
        for left in inner[0].values():
            storages.drop(left)

    def _dying(self, graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
        if graph not in self.dying:
            self.dying[graph] = ir.dying(graph)
        return self.dying[graph]

    def _evaluate(self, node: torch.fx.Node, values: list[_Env]) -> list[Any]:
        given = [torch.fx.node.map_arg((node.args, node.kwargs), mine.__getitem__) for mine in values]
        kernel = of_node(node.target)
        if kernel is not None and kernel.name in FUSED:
            _, _, *rest = given[0][0]
            operands = ([args[i] for args, _ in given] for i in range(2))
            return list(FUSED[kernel.name](self.program.mesh, *operands, *rest))
        if kernel is not None and kernel.name in COLLECTIVES:
            _, *rest = given[0][0]
            return COLLECTIVES[kernel.name](self.program.mesh, [args[0] for args, _ in given], *rest)
        return [node.target(*args, **kwargs) for args, kwargs in given]  # type: ignore[operator]


def _drop(dead: Sequence[torch.fx.Node], values: list[_Env], storages: _Storages) -> None:
    for node in dead:
        storages.drop(values[0][node])
        for mine in values:
            del mine[node]


class _Storages:
    """Bytes of the storages that live values hold, inputs apart, and the most so far."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.holders: dict[int, int] = defaultdict(int)
        self.live, self.peak, self.peak_at = 0, 0, ""

    def _each(self, value: Any) -> list[tuple[int, int]]:
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        return [(s.data_ptr(), s.nbytes()) for s in storages if s.nbytes() and s.data_ptr() not in self.inputs]

    def add(self, value: Any, by: str = "") -> None:
        """Count what `value` holds, made by the op and in the scope that `by` names."""
        for pointer, size in self._each(value):
            self.live += size * (self.holders[pointer] == 0)
            self.holders[pointer] += 1
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, by

    def drop(self, value: Any) -> None:
        for pointer, size in self._each(value):
            self.holders[pointer] -= 1
            self.live -= size * (self.holders[pointer] == 0)
