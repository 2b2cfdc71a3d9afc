"""eager: the lowered graph op by op on one device, as torch.fx writes it out. The oracle for compilation."""

from __future__ import annotations

import torch

from llama_fn import ir
from llama_fn.backends import Executable, Program, communication, forms
from llama_fn.passes import copy_graph
from llama_fn.passes.expand import expand
from llama_fn.processes import Processes


def compile(program: Program, processes: Processes | None = None) -> Executable:
    collectives = communication(program, "eager", processes)
    gm = copy_graph(program.graph_module)
    if collectives:
        gm = expand(gm, dict.fromkeys(collectives, "functional"), forms.finder(collectives), {})

    @torch.no_grad()
    def run(inputs):
        return gm(*inputs)

    return Executable(run, ir.as_text(gm, "eager"), local=processes is not None)
