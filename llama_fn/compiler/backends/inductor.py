"""inductor: the lowered graph compiled by torch's inductor for CPU and CUDA, ahead of time.

Repeated layers are outlined, our ops expanded into one of their forms, and the whole compiled and kept on disk under a
key of everything it depends on: a second start of the same job loads it.
"""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.registry import of_node
from llama_fn import compat
from llama_fn.compiler import calls, ir, passes, ranges
from llama_fn.compiler.backends import CodeOrigin, Executable, Program, code_cache, communication, forms
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.passes.outline import outline
from llama_fn.compiler.passes.place import place
from llama_fn.distributed import Processes
from llama_fn.errors import UserError
from sharding.mesh import Mesh

log = logging.getLogger("llama_fn.inductor")

_PATCHES: Mapping[str, dict[str, Any]] = {"cpu": {}, "cuda": {"triton.cudagraphs": True}}


def check_tools(device: str) -> None:
    """UserError where this machine lacks what inductor builds kernels with."""
    missing = compat.missing_tool(torch.device(device).type)
    if missing:
        raise UserError(
            f"--run.backend=inductor builds its kernels with {missing}. On Debian: apt-get install g++ python3-dev. "
            "--run.backend=eager needs none of it, and is slower"
        )


def compile(
    program: Program,
    device: str = "cpu",
    attention: str = "auto",
    cache: Path | None = None,
    outlined: bool = True,
    processes: Processes | None = None,
    profiled: bool = False,
) -> Executable:
    """`attention`: form of that kernel, auto picks by device; `cache`: folder of compiled code, None keeps none of it;
    `profiled`: the code names its scopes to a profiler, and a CUDA graph, which could not, is not made of it."""
    check_tools(device)
    collectives = communication(program, "inductor", processes)
    kind = torch.device(device).type
    chosen = forms.choose(kind, _compute_dtype(program.graph_module), attention)
    log.info("kernels: %s; the others reference, fused by inductor", ", ".join(f"{k}={v}" for k, v in chosen.items()))
    gm = place(calls.inlined(program.graph_module), device)
    if outlined:
        gm = outline(gm, passes.Context(Mesh(), []))
    chosen |= dict.fromkeys(collectives, "functional") | {"barrier": "reference"}
    gm = expand(gm, chosen, forms.finder(collectives), compat.inductor_decompositions())
    text = ir.as_text(gm, "inductor")
    inputs = [compat.node_value(node) for node in ir.placeholders(gm.graph)]
    staying = sorted({*ir.written(gm.graph), *program.weights})
    patches, naming = _PATCHES[kind], None
    if profiled:
        patches, naming = {}, compat.ranges_in_code(ranges.shared_name, text)
        if _PATCHES[kind]:
            log.warning("profiling: the step runs without CUDA graph, so that its kernels carry scopes")
    folder = compat.keep_compiled_code((code_cache.usable(cache) if cache else code_cache.private()) / _machine())
    with code_cache.opened(folder):
        compiled = compat.inductor_compile(
            gm, inputs, patches, staying, compat.physical_cores(), cache is not None, naming
        )

    @torch.no_grad()
    def run(flat: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        results = compiled.run(*flat)
        # A CUDA graph writes its results to the same memory in every run, and is not replayed while one is still held.
        return [result.clone() for result in results] if patches.get("triton.cudagraphs") else results

    origin = CodeOrigin(compiled.key, compiled.file, compiled.from_cache) if compiled.key else None
    return Executable(run, text, origin, local=processes is not None, code=compiled.code, device=device)


def _compute_dtype(gm: torch.fx.GraphModule) -> torch.dtype:
    """The dtype of the matrix products."""
    products = [n for n in ir.calls(gm.graph) if (kernel := of_node(n.target)) and kernel.name == "einsum"]
    return compat.node_value(products[0]).dtype if products else torch.float32


def _machine() -> str:
    """What compiled code depends on besides its graph, inductor's settings and torch, which inductor's key has."""
    facts = [platform.python_version(), platform.machine(), compat.cpu_model(), str(torch.get_num_threads())]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
