"""The graphs of a step in operators that torchair converts: our ops in their `npu` forms, constants computed once, and
nothing in them that another process of the stage would have otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels.registry import KERNELS
from llama_fn import compat
from llama_fn.compiler import calls, ir, passes
from llama_fn.compiler.backends import forms
from llama_fn.compiler.backends.npu_positions import BY_POSITION, positions_as_inputs
from llama_fn.compiler.passes.constants import constants
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.passes.in_place import COPY, add_in_place
from llama_fn.compiler.passes.place import place
from llama_fn.errors import UserError
from sharding.mesh import Mesh


@dataclass(frozen=True)
class NpuGraph:
    """A graph for torchair. `kept`: which of its inputs are, overwritten, which of its results. `positions`: the axes
    along which it takes this process's position, behind its other inputs."""

    gm: torch.fx.GraphModule
    kept: Mapping[int, int]
    positions: tuple[str, ...] = ()


def npu_graphs(
    gm: torch.fx.GraphModule, collectives: Mapping[str, Callable[..., Any]], device: str
) -> dict[torch.fx.GraphModule, NpuGraph]:
    """Of the bodies that `gm` calls, or if it calls none of `gm` itself, which are changed. `collectives`: their forms
    by name. UserError for float64."""
    for each in (*ir.subgraphs(gm), gm):
        place(each, device)
        _refuse_float64(each)
    chosen = dict.fromkeys(KERNELS, "npu") | dict.fromkeys(collectives, "functional")
    chosen = {name: form for name, form in chosen.items() if name not in (*compat.CONVERTED, *BY_POSITION)}
    bodies, expanded = calls.bodies(gm), dict[str, torch.fx.GraphModule]()
    for body in bodies or [gm]:
        expand(body, chosen, forms.finder(collectives), {}, expanded)
    if bodies:
        add_in_place(gm)
    for body, scope in bodies.items():
        calls.put_in_scope(body, scope)
    return {body: _finished(body) for body in bodies or [gm]}


def _finished(gm: torch.fx.GraphModule) -> NpuGraph:
    inputs, out = ir.placeholders(gm.graph), ir.output_node(gm.graph)
    kept = {k: inputs.index(x.args[0]) for k, x in enumerate(ir.results(gm.graph)) if x.target is COPY}
    out.args = ([x for k, x in enumerate(ir.results(gm.graph)) if k not in kept],)
    positions = positions_as_inputs(gm)
    gm = constants(gm, passes.Context(Mesh(), []))
    gm.recompile()
    return NpuGraph(gm, kept, positions)


def _refuse_float64(gm: torch.fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            raise UserError(
                f"{node.meta.get('path', node.name)} is float64, which Ascend's matrix units do not compute: use "
                "--model.compute_dtype=fp32, bf16 or fp16 with --run.backend=npu"
            )
