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
from llama_fn.compiler import finite, ir, liveness
from llama_fn.compiler.backends import Executable, Program
from llama_fn.compiler.ranges import RANGES, name_of
from sharding.simulate import COLLECTIVES, FUSED, join, part


def compile(program: Program, check_finite: bool = False) -> Executable:
    """`check_finite`: finite.NonFinite for the first op whose result is not, on any device."""
    interpreter = Interpreter(program, check_finite)
    run = interpreter.run if program.mesh.size == 1 else interpreter.run_global
    return Executable(run, ir.as_text(program.graph_module, "interpret"), measured=lambda: interpreter.memory)


class Interpreter:
    """Runs one graph on every device; `memory` holds device 0's live bytes of the last run, from real storages."""

    def __init__(self, program: Program, check_finite: bool = False) -> None:
        self.program, self.graph, self.check_finite = program, program.graph_module.graph, check_finite
        self.memory: liveness.Memory | None = None
        last: dict[torch.fx.Node, torch.fx.Node] = {used: n for n in self.graph.nodes for used in n.all_input_nodes}
        self.dying: dict[torch.fx.Node, list[torch.fx.Node]] = defaultdict(list)
        for value, user in last.items():
            if user.op != "output":
                self.dying[user].append(value)

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
        ranks = range(len(inputs))
        values: list[dict[torch.fx.Node, Any]] = [
            dict(zip(ir.placeholders(self.graph), each, strict=True)) for each in inputs
        ]
        if self.check_finite:
            for r, each in zip(ranks, inputs, strict=True):
                finite.check_inputs(self.graph, each, f" on device {r}")
        storages = _Storages(inputs[0])
        peak, peak_at = 0, ""
        for node in ir.calls(self.graph):
            if RANGES.on:
                RANGES.to(name_of(node))
            for r, result in zip(ranks, self._evaluate(node, values), strict=True):
                values[r][node] = result
                if self.check_finite:
                    given = [values[r][operand] for operand in ir.operands(node)]
                    finite.check_result(node, result, given, f" on device {r}")
            storages.add(values[0][node])
            if storages.live > peak:
                peak, peak_at = storages.live, f"{node.target} in {ir.scope_of(node)}"
            for dead in [*self.dying[node], *([] if node.users else [node])]:
                storages.drop(values[0][dead])
                for mine in values:
                    del mine[dead]
        RANGES.to("")
        results = [[mine[r] for r in ir.results(self.graph)] for mine in values]
        base = tensor_bytes(list(inputs[0]))
        self.memory = liveness.Memory(base, tensor_bytes(results[0]), peak, base + peak, peak_at)
        return results

    def _evaluate(self, node: torch.fx.Node, values: list[dict[torch.fx.Node, Any]]) -> list[Any]:
        calls = [torch.fx.node.map_arg((node.args, node.kwargs), mine.__getitem__) for mine in values]
        kernel = of_node(node.target)
        if kernel is not None and kernel.name in FUSED:
            _, _, *rest = calls[0][0]
            operands = ([args[i] for args, _ in calls] for i in range(2))
            return list(FUSED[kernel.name](self.program.mesh, *operands, *rest))
        if kernel is not None and kernel.name in COLLECTIVES:
            _, *rest = calls[0][0]
            return COLLECTIVES[kernel.name](self.program.mesh, [args[0] for args, _ in calls], *rest)
        return [node.target(*args, **kwargs) for args, kwargs in calls]  # type: ignore[operator]


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
