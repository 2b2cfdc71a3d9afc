"""interpret: the per-device graph node by node, all devices of the mesh in lockstep inside one process.

Arguments and results are global: each device gets its part, and the parts are put together again. Collectives are
arithmetic between the devices' values. The stages of a pipeline take turns, each with its own graph and its devices in
lockstep (together.py). Every value is freed after its last use, and the live bytes of each stage's first device are
counted. The oracle for partitioning and for memory; it trains for real, slowly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from typing import Any

import torch

from kernels.registry import of_node, tensor_bytes
from kernels.repeat import flat
from llama_fn.compiler import calls, finite, ir, liveness
from llama_fn.compiler.backends import Executable, Program
from llama_fn.compiler.backends.together import Mailbox, Meeting, Message, Wait, together
from llama_fn.compiler.cost import scratch_of
from llama_fn.compiler.ranges import RANGES, name_of
from sharding.messages import is_message, over_stages, receive, send, way
from sharding.simulate import COLLECTIVES, FUSED, join, part


def compile(program: Program, check_finite: bool = False) -> Executable:
    """`check_finite`: finite.NonFinite for the first op whose result is not, on any device."""
    interpreter = Interpreter(program, check_finite)
    run = interpreter.run if program.mesh.size == 1 else interpreter.run_global
    text = "\n".join(ir.as_text(gm, "interpret") for gm in program.graphs)
    return Executable(run, text, measured=lambda stage: interpreter.memory[stage] if interpreter.memory else None)


_Env = dict[torch.fx.Node, Any]  # values of one device
_Steps = Generator[Wait, Any, Any]  # a graph that is run, up to where it waits for other stages


class Interpreter:
    """Runs the graph of each stage on its devices; `memory` holds, by stage, the live bytes of its first device in the
    last run, from real storages."""

    def __init__(self, program: Program, check_finite: bool = False) -> None:
        self.program, self.check_finite = program, check_finite
        self.memory: list[liveness.Memory] = []
        self.stage = _Stage
        self.mailbox = Mailbox()

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Results of a mesh of one device."""
        return self.lockstep([inputs])[0]

    @torch.no_grad()
    def run_global(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Global results from global inputs, which donated ones of are overwritten."""
        program, ranks = self.program, range(self.program.mesh.size)
        held = [[part(x, p, program.mesh, r) for x, p in zip(inputs, program.inputs, strict=True)] for r in ranks]
        results = self.lockstep(held)
        for i in ir.written(program.graphs[0].graph):
            inputs[i].copy_(join([parts[i] for parts in held], program.inputs[i], program.mesh, inputs[i].shape))
        return [
            join([one[o] for one in results], layout, program.mesh, shape)
            for o, (layout, shape) in enumerate(zip(program.outputs, program.output_shapes, strict=True))
        ]

    @torch.no_grad()
    def lockstep(self, inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Results per device from the inputs per device."""
        stages = [
            self.stage(self, number, [inputs[rank] for rank in self.program.ranks(number)])
            for number in range(len(self.program.graphs))
        ]
        self.mailbox.held.clear()
        by_stage = together([stage.steps() for stage in stages], self.mailbox, self._meet)
        RANGES.to("")
        self.memory = [stage.memory(results) for stage, results in zip(stages, by_stage, strict=True)]
        by_rank = {
            rank: result
            for stage, results in zip(stages, by_stage, strict=True)
            for rank, result in zip(stage.ranks, results, strict=True)
        }
        return [by_rank[rank] for rank in range(len(inputs))]

    def _meet(self, meetings: list[Meeting]) -> list[Any]:
        """A collective of all stages, one result per stage; RuntimeError where they came for different ones."""
        names = {(meeting.name, meeting.rest) for meeting in meetings}
        if len(names) > 1:
            raise RuntimeError(f"stages meet in different collectives: {sorted(map(str, names))}")
        (name, rest), ranks = names.pop(), range(self.program.mesh.size)
        at = {rank: (s, i) for s in range(len(meetings)) for i, rank in enumerate(self.program.ranks(s))}
        given = [[meetings[at[r][0]].given[arg][at[r][1]] for r in ranks] for arg in range(len(meetings[0].given))]
        results = COLLECTIVES[name](self.program.mesh, *given, *rest)
        return [[results[rank] for rank in self.program.ranks(stage)] for stage in range(len(meetings))]


class _Stage:
    """One run of the graph of a stage, on its devices in lockstep."""

    def __init__(self, interpreter: Interpreter, number: int, inputs: Sequence[Sequence[torch.Tensor]]) -> None:
        program = interpreter.program
        self.number, self.inputs, self.count = number, inputs, len(program.graphs)
        self.gm, self.ranks, self.mesh = program.graphs[number], program.ranks(number), program.stage_mesh
        self.check_finite, self.mailbox = interpreter.check_finite, interpreter.mailbox
        self.dying: dict[torch.fx.Graph, dict[torch.fx.Node, list[torch.fx.Node]]] = {}
        self.storages = _Storages(inputs[0])

    def steps(self) -> _Steps:
        """Gives the results, per device."""
        graph = self.gm.graph
        if self.check_finite:
            for rank, each in zip(self.ranks, self.inputs, strict=True):
                finite.check_inputs(graph, each, f" on device {rank}")
        values = [dict[torch.fx.Node, Any](zip(ir.placeholders(graph), each, strict=True)) for each in self.inputs]
        return (yield from self._run(self.gm, values, ""))

    def memory(self, results: Sequence[Sequence[torch.Tensor]]) -> liveness.Memory:
        """What its first device took."""
        base, peak = tensor_bytes(list(self.inputs[0])), self.storages.peak
        return liveness.Memory(base, tensor_bytes(results[0]), peak, base + peak, self.storages.peak_at)

    def _run(self, gm: torch.fx.GraphModule, values: list[_Env], within: str) -> _Steps:
        """Gives the results of a graph, called in the scope `within`, from its inputs in `values`, one dict for each
        device."""
        dying, storages = self._dying(gm.graph), self.storages
        for node in ir.calls(gm.graph):
            if calls.is_call(node):
                yield from self._call(gm, node, values, dying[node], within)
                continue
            if RANGES.on:
                RANGES.to(name_of(node, within))
            evaluated = yield from self._evaluate(node, values)
            for r, result in enumerate(evaluated):
                values[r][node] = result
                if self.check_finite and node.target is not receive.op:  # what it gives is yet to come
                    given = [values[r][operand] for operand in ir.operands(node)]
                    finite.check_result(node, result, given, f" on device {self.ranks[r]}", within)
            place = calls.joined(within, ir.scope_of(node))
            storages.add(values[0][node], f"{node.target} in {place}", scratch_of(node))
            _drop([*dying[node], *([] if node.users else [node])], values, storages)
        return [[mine[r] for r in ir.results(gm.graph)] for mine in values]

    def _call(
        self, gm: torch.fx.GraphModule, node: torch.fx.Node, values: list[_Env], dying: list[torch.fx.Node], within: str
    ) -> _Steps:
        """Run a body. What it reads for the last time is its own, and freed inside."""
        body, scope, storages = calls.body_of(gm, node), calls.joined(within, ir.scope_of(node)), self.storages
        inputs = ir.placeholders(body.graph)
        inner: list[_Env] = []
        for mine in values:
            operands = torch.fx.node.map_arg(node.args[1:], mine.__getitem__)
            inner.append(dict(zip(inputs, flat(operands), strict=True)))
            del operands
        for operand in inner[0].values():
            storages.add(operand)
        _drop(dying, values, storages)
        results = yield from self._run(body, inner, scope)
        for mine, each in zip(values, results, strict=True):
            mine[node] = tuple(each)
        storages.add(values[0][node])
        for left in inner[0].values():
            storages.drop(left)

    def _dying(self, graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
        if graph not in self.dying:
            self.dying[graph] = ir.dying(graph)
        return self.dying[graph]

    def _evaluate(self, node: torch.fx.Node, values: list[_Env]) -> _Steps:
        given = [torch.fx.node.map_arg((node.args, node.kwargs), mine.__getitem__) for mine in values]
        kernel = of_node(node.target)
        if is_message(node):
            return (yield from self._message(node, [args for args, _ in given]))
        if kernel is not None and kernel.name in FUSED:
            _, _, *rest = given[0][0]
            operands = ([args[i] for args, _ in given] for i in range(2))
            return list(FUSED[kernel.name](self.mesh, *operands, *rest))
        if kernel is not None and kernel.name in COLLECTIVES:
            several = 2 if kernel.name == "wait" else 1
            tensors: Any = tuple([args[i] for args, _ in given] for i in range(several))
            others = tuple(given[0][0][several:])
            if over_stages(node):
                return (yield Meeting(kernel.name, tensors, others))
            return COLLECTIVES[kernel.name](self.mesh, *tensors, *others)
        return [node.target(*args, **kwargs) for args, kwargs in given]  # type: ignore[operator]

    def _message(self, node: torch.fx.Node, given: list[Any]) -> _Steps:
        """Send, ask for a message, or wait for it. Each device of a stage has its like on the other."""
        _, step, tag = way(node)
        other = (self.number + step) % self.count
        if node.target is send.op:
            self.mailbox.put((self.number, other, tag), [args[0].clone() for args in given])
            return [args[0].new_zeros(1) for args in given]
        if node.target is receive.op:
            like = self.inputs[0][0]
            return [torch.empty(args[0], dtype=args[1], device=like.device) for args in given]
        arrived = yield Message((other, self.number, tag))
        return [args[0].copy_(x) for args, x in zip(given, arrived, strict=True)]


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

    def add(self, value: Any, by: str = "", scratch: int = 0) -> None:
        """Count what `value` holds, made by the op and in the scope that `by` names with `scratch` bytes besides."""
        for pointer, size in self._each(value):
            self.live += size * (self.holders[pointer] == 0)
            self.holders[pointer] += 1
        if self.live + scratch > self.peak:
            self.peak, self.peak_at = self.live + scratch, by

    def drop(self, value: Any) -> None:
        for pointer, size in self._each(value):
            self.holders[pointer] -= 1
            self.live -= size * (self.holders[pointer] == 0)
