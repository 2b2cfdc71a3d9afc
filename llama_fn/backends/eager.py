"""eager: the lowered graph op by op on one device, as torch.fx writes it out. The oracle for compilation."""

from __future__ import annotations

import torch

from llama_fn import ir
from llama_fn.backends import Executable, Program, one_device
from llama_fn.passes import copy_graph


def compile(program: Program) -> Executable:
    one_device(program, "eager")
    gm = copy_graph(program.graph_module)

    @torch.no_grad()
    def run(inputs):
        return gm(*inputs)

    return Executable(run, ir.as_text(gm, "eager"))
