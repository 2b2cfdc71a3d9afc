"""eager: the lowered graph op by op on one device, as torch.fx writes it out. The oracle for compilation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kernels.repeat import flat
from llama_fn.compiler import calls, finite, ir
from llama_fn.compiler.backends import Executable, Program, communication, forms
from llama_fn.compiler.passes import copy_graph
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.ranges import RANGES, name_of
from llama_fn.distributed import Processes


class _NodeByNode(torch.fx.Interpreter):
    """Runs a graph so that a profiler is told the scopes, and `check` sees each op's result; `within`: the scope in
    which the graph is called."""

    def __init__(self, gm: torch.fx.GraphModule, check: bool, within: str = "") -> None:
        super().__init__(gm)
        self.check, self.within = check, within
        self.extra_traceback = False  # an error is the op's, and says where it stands

    def run_node(self, n: torch.fx.Node) -> Any:
        if calls.is_call(n):
            body, *operands = self.fetch_args_kwargs_from_env(n)[0]
            return _NodeByNode(body, self.check, calls.joined(self.within, ir.scope_of(n))).run(*flat(operands))
        RANGES.to(name_of(n, self.within) if n.op == "call_function" else "")
        result = super().run_node(n)
        if self.check and n.op == "call_function":
            operands = [self.env[operand] for operand in ir.operands(n)]
            finite.check_result(n, result, operands, within=self.within)
        return result


def compile(program: Program, processes: Processes | None = None, check_finite: bool = False) -> Executable:
    """`check_finite`: finite.NonFinite for the first op whose result is not."""
    collectives = communication(program, "eager", processes)
    gm = copy_graph(program.graph_module)
    if collectives:
        gm = expand(gm, dict.fromkeys(collectives, "functional"), forms.finder(collectives), {})

    @torch.no_grad()
    def run(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if check_finite:
            finite.check_inputs(gm.graph, inputs)
        return _NodeByNode(gm, check_finite).run(*inputs) if RANGES.on or check_finite else gm(*inputs)

    return Executable(run, ir.as_text(gm, "eager"), local=processes is not None)
