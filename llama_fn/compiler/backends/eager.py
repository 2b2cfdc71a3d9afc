"""eager: the lowered graph op by op on one device, as torch.fx writes it out. The oracle for compilation."""

from __future__ import annotations

from typing import Any

import torch

from llama_fn.compiler import ir
from llama_fn.compiler.backends import Executable, Program, communication, forms
from llama_fn.compiler.passes import copy_graph
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.ranges import RANGES, name_of
from llama_fn.distributed.processes import Processes


class _Named(torch.fx.Interpreter):
    """Runs a graph node by node for a profiler, which is told the scopes."""

    def run_node(self, n: torch.fx.Node) -> Any:
        RANGES.to(name_of(n) if n.op == "call_function" else "")
        return super().run_node(n)


def compile(program: Program, processes: Processes | None = None) -> Executable:
    collectives = communication(program, "eager", processes)
    gm = copy_graph(program.graph_module)
    if collectives:
        gm = expand(gm, dict.fromkeys(collectives, "functional"), forms.finder(collectives), {})

    @torch.no_grad()
    def run(inputs):
        return _Named(gm).run(*inputs) if RANGES.on else gm(*inputs)

    return Executable(run, ir.as_text(gm, "eager"), local=processes is not None)
