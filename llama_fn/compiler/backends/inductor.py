"""inductor: the lowered graph compiled by torch's inductor for CPU and CUDA, ahead of time.

Repeated layers are outlined, our ops expanded into one of their forms, and the whole compiled and kept on disk under a
key of everything it depends on: a second start of the same job loads it. On CPU the microbatch is compiled once, and so
is what stands before and after its calls; on CUDA the step is one piece of code and one CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.registry import of_node
from llama_fn import compat
from llama_fn.compiler import calls, ir, passes, ranges
from llama_fn.compiler.backends import CodeOrigin, Executable, Plain, Program, code_cache, communication, forms
from llama_fn.compiler.backends.in_turn import Order, Run, between_stages, follow
from llama_fn.compiler.garbage import uncollected
from llama_fn.compiler.passes.copy_early import copy_early
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.passes.in_place import add_in_place
from llama_fn.compiler.passes.outline import outline
from llama_fn.compiler.passes.place import place
from llama_fn.compiler.passes.widen import widen
from llama_fn.compiler.pieces import in_pieces
from llama_fn.distributed import Messages, Processes
from llama_fn.errors import UserError
from sharding.mesh import Mesh

log = logging.getLogger("llama_fn.inductor")

_PATCHES: Mapping[str, dict[str, Any]] = {"cpu": {}, "cuda": {"triton.cudagraphs": True}}
# In 16 bits on a CPU: with vectors of 512, the code of torch 2.13 that transposes blocks of bf16 gave NaN from finite
# numbers on an AVX-512 Xeon (a step of llama with 4 heads of 32), where 256 and no vectors gave eager's numbers.
_NARROW: dict[str, Any] = {"cpp.simdlen": 256}


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
    compilers: int = 0,
) -> Executable:
    """`attention`: form of that kernel, auto picks by device; `cache`: folder of compiled code, None keeps none of it;
    `profiled`: the code names its scopes to a profiler, and a CUDA graph, which could not, is not made of it.
    `compilers`: C++ compilers that run at a time, 0: one for each core."""
    check_tools(device)
    collectives = communication(program, "inductor", processes)
    kind = torch.device(device).type
    mine, piped = program.graph_of(processes), len(program.graphs) > 1
    chosen = forms.choose(kind, _compute_dtype(mine), attention, _has_documents(mine))
    log.info("kernels: %s; the others reference, fused by inductor", ", ".join(f"{k}={v}" for k, v in chosen.items()))
    wide = compat.slow_products() if kind == "cpu" else frozenset()
    if _compute_dtype(mine) in wide:
        log.warning(
            "this CPU has no instructions for products in %s: they are computed in float32 and rounded, no faster than "
            "--model.compute_dtype=fp32", str(_compute_dtype(mine)).removeprefix("torch."),
        )  # fmt: skip
    chosen |= dict.fromkeys(collectives, "functional") | {"barrier": "reference"}
    patches = _PATCHES[kind] | (_NARROW if kind == "cpu" and _compute_dtype(mine).itemsize == 2 else {})
    if kind == "cuda" and (profiled or piped):
        why = "a pipeline: its messages go" if piped else "profiling, so that its kernels carry scopes: it runs"
        log.warning("%s outside of a CUDA graph", why)
        patches = {}

    gm = passes.copy_graph(mine) if kind == "cpu" or piped else calls.inlined(mine)
    gm = in_pieces(place(gm, device))
    if outlined:
        gm = outline(gm, passes.Context(Mesh(), []))
    expanded: dict[str, torch.fx.GraphModule] = {}
    for body in calls.bodies(gm):
        expand(body, chosen, forms.finder(collectives), compat.inductor_decompositions(), expanded)
        widen(body, wide)
    gm = add_in_place(gm)
    bodies = calls.bodies(gm)
    for body, scope in bodies.items():
        calls.put_in_scope(copy_early(body), scope)
    staying = {*ir.written(mine.graph), *program.weights}
    sources = [_source(gm, body, staying, profiled) for body in bodies]
    with code_cache.opened(code_cache.of_inductor(cache)), uncollected():
        compiled = compat.inductor_compile(sources, patches, compilers or compat.physical_cores(), cache is not None)
    runs = [_run(each, "triton.cudagraphs" in patches) for each in compiled]
    origins = tuple(CodeOrigin(each.key, each.file, each.from_cache) for each in compiled if each.key)
    text, code = ir.as_text(gm, "inductor"), "\n".join(each.code for each in compiled)
    messages = Messages(processes, device) if processes and piped else None
    between = {str(op): form for op, form in between_stages(messages, collectives).items()}
    order = Order.of(gm, list(bodies), list(between))
    run_all = follow(order, runs, between)

    @torch.no_grad()
    def run(flat: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return run_all(list(flat))

    codes = tuple(each.plain for each in compiled if each.plain)
    groups = dict(processes.groups(())) if processes else {}
    kept = None if piped or len(codes) < len(compiled) else Plain(order, codes, groups)
    return Executable(run, text, origins, local=processes is not None, code=code, device=device, plain=kept)


def _source(
    gm: torch.fx.GraphModule, body: torch.fx.GraphModule, staying: Collection[int], profiled: bool
) -> compat.GraphSource:
    """What is compiled of a body, told which inputs of it are inputs of `gm` that stay where they are. CUDA graphs want
    to know it, where `gm` is a single body."""
    kept = {node for i, node in enumerate(ir.placeholders(gm.graph)) if i in staying}
    call = next(node for node in ir.calls(gm.graph) if calls.is_call(node) and calls.body_of(gm, node) is body)
    static = [i for i, operand in enumerate(call.args[1:]) if operand in kept]
    text = ir.as_text(body, "inductor") + ranges.title("scope/0", "phase")  # the form of titles is in the code, too
    ranges_of = compat.ranges_in_code(ranges.shared_name, ranges.of_call, text) if profiled else None
    return compat.GraphSource(body, [compat.node_value(x) for x in ir.placeholders(body.graph)], static, ranges_of)


def _run(compiled: compat.CompiledGraph, in_cuda_graph: bool) -> Run:
    if not in_cuda_graph:
        return compiled.run
    # A CUDA graph writes its results to the same memory in every run, and is not replayed while one is still held.
    return lambda flat: [result.clone() for result in compiled.run(flat)]


def _has_documents(gm: torch.fx.GraphModule) -> bool:
    """Whether attention is told where documents begin."""
    calls_of = [n for n, _ in calls.counted(gm) if (kernel := of_node(n.target)) and kernel.name == "attention"]
    return any(len(node.args) > 4 for node in calls_of)


def _compute_dtype(gm: torch.fx.GraphModule) -> torch.dtype:
    """The dtype of the matrix products."""
    products = [n for n, _ in calls.counted(gm) if (kernel := of_node(n.target)) and kernel.name == "einsum"]
    return compat.node_value(products[0]).dtype if products else torch.float32
