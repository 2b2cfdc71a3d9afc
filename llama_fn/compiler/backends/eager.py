"""eager: the lowered graph op by op on one device, as torch.fx writes it out. The oracle for compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kernels.repeat import flat
from llama_fn.compiler import calls, finite, ir
from llama_fn.compiler.backends import Executable, Program, communication, forms
from llama_fn.compiler.passes import copy_graph
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.ranges import RANGES, name_of
from llama_fn.distributed import Messages, Processes

NO_MESSAGES: Mapping[Any, Callable[..., torch.Tensor]] = {}


class _NodeByNode(torch.fx.Interpreter):
    """Runs a graph so that a profiler is told the scopes, and `check` sees each op's result; `within`: the scope in
    which the graph is called; `messages`: by op, what goes to other stages of a pipeline."""

    def __init__(
        self, gm: torch.fx.GraphModule, check: bool, within: str = "",
        messages: Mapping[Any, Callable[..., torch.Tensor]] = NO_MESSAGES,
    ) -> None:  # fmt: skip
        super().__init__(gm)
        self.check, self.within, self.messages = check, within, messages
        self.extra_traceback = False  # an error is the op's, and says where it stands

    def run_node(self, n: torch.fx.Node) -> Any:
        if calls.is_call(n):
            body, *operands = self.fetch_args_kwargs_from_env(n)[0]
            return _NodeByNode(body, self.check, calls.joined(self.within, ir.scope_of(n))).run(*flat(operands))
        if n.target in self.messages:
            return self.messages[n.target](*self.fetch_args_kwargs_from_env(n)[0])
        RANGES.to(name_of(n, self.within) if n.op == "call_function" else "")
        result = super().run_node(n)
        if self.check and n.op == "call_function":
            operands = [self.env[operand] for operand in ir.operands(n)]
            finite.check_result(n, result, operands, within=self.within)
        return result


def compile(
    program: Program, processes: Processes | None = None, check_finite: bool = False, device: str = "cpu"
) -> Executable:
    """`device`: where messages of a pipeline arrive; `check_finite`: finite.NonFinite for the first op whose result is
    not."""
    collectives = communication(program, "eager", processes)
    gm = copy_graph(program.graph_of(processes))
    messages = Messages(processes, device).forms if processes and len(program.graphs) > 1 else NO_MESSAGES
    if collectives:
        gm = expand(gm, dict.fromkeys(collectives, "functional"), forms.finder(collectives), {})

    @torch.no_grad()
    def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if check_finite:
            finite.check_inputs(gm.graph, inputs)
        by_node = RANGES.on or check_finite or messages
        return _NodeByNode(gm, check_finite, messages=messages).run(*inputs) if by_node else gm(*inputs)

    return Executable(run, ir.as_text(gm, "eager"), local=processes is not None)
