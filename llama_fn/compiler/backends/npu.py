"""npu: the lowered graph as one Ascend GE graph, through torchair, the graph engine of torch_npu.

Our ops are written in their `npu` forms, what depends on no input is computed once, and the whole step is converted:
static shapes, donated inputs as RefData that the graph updates in place. Nothing falls back: an operator without a
converter is an error before anything compiles. GE itself compiles at the first call.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.registry import KERNELS
from llama_fn import compat
from llama_fn.ascend.ge_text import ge_scopes, ge_text
from llama_fn.compiler import calls, ir, passes
from llama_fn.compiler.backends import CodeOrigin, Executable, Program, communication, forms
from llama_fn.compiler.passes.constants import constants
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.passes.place import place
from llama_fn.distributed import Processes
from llama_fn.errors import UserError
from sharding.mesh import Mesh


def compile(
    program: Program,
    device: str = "npu",
    processes: Processes | None = None,
    write: Callable[[str, str, str], None] | None = None,
) -> Executable:
    """`write` gets the GE graph, torchair's options and a readable text before anything runs (inspect/dump.py)."""
    converted = convert(program, device, processes)
    text = ge_text(converted.proto, converted.shapes)
    if write is not None:
        write(converted.pbtxt(), converted.options(), text)

    @torch.no_grad()
    def run(flat: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return converted.run(*flat)

    origin = CodeOrigin(hashlib.sha256(text.encode()).hexdigest(), None, from_cache=False)
    local, scopes = processes is not None, ge_scopes(converted.proto)
    return Executable(run, text, (origin,), local=local, scopes=scopes, device=device)


def convert(program: Program, device: str, processes: Processes | None) -> compat.GeGraph:
    """The GE graph; UserError listing every operator that Ascend has none for."""
    collectives = {**communication(program, "npu", processes), **_named_groups(processes)}
    compat.load_torchair()
    gm = place(calls.inlined(program.graph_module), device)
    _refuse_float64(gm)
    chosen = dict.fromkeys(KERNELS, "npu") | dict.fromkeys(collectives, "functional")
    chosen = {name: form for name, form in chosen.items() if name not in compat.CONVERTED}
    gm = expand(gm, chosen, forms.finder(collectives), {})
    gm = constants(gm, passes.Context(Mesh(), []))
    gm.recompile()
    refuse_unsupported(gm)
    inputs = [compat.node_value(node) for node in ir.placeholders(gm.graph)]
    return compat.ge_convert(gm, inputs, {n.name: f"{ir.phase_of(n)} {ir.scope_of(n)}" for n in ir.calls(gm.graph)})


def _named_groups(processes: Processes | None) -> dict[str, Callable[..., Any]]:
    """The ops that stay as they are but for the name of their process group in the place of the axes."""
    if processes is None:
        return {}

    def form(op: Any) -> Callable[..., Any]:
        return lambda a, b, axes, n, transposed: op(a, b, processes.groups([axes])[axes].name, n, transposed)

    return {name: form(KERNELS[name].op) for name in compat.CONVERTED_IN_GROUP}


def _refuse_float64(gm: torch.fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            raise UserError(
                f"{node.meta.get('path', node.name)} is float64, which Ascend's matrix units do not compute: use "
                "--model.compute_dtype=fp32, bf16 or fp16 with --run.backend=npu"
            )


def refuse_unsupported(gm: torch.fx.GraphModule) -> None:
    """UserError with every operator of the graph that torchair cannot convert, and where it stands."""
    scopes: dict[object, dict[str, None]] = defaultdict(dict)
    for node in ir.calls(gm.graph):
        if hasattr(node.target, "_schema"):
            scopes[node.target][f"{ir.scope_of(node)}, {ir.phase_of(node)}"] = None
    missing = compat.without_converter(list(scopes))
    if missing:
        lines = [f"  {target} in {'; '.join(list(scopes[target])[:4])}" for target in missing]
        raise UserError(
            f"torchair of torch_npu {compat.TORCH_NPU} has no converter for {len(missing)} operators of this graph:\n"
            + "\n".join(lines)
            + "\nWrite them with other operators, in the kernel's `npu` form, or register a converter in "
            "llama_fn/compat/ge_converters.py"
        )
