"""Inductor: compiling a graph that is already what it lowers, with what costs time and gives nothing left out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from llama_fn.compat import cpp_units as cpp

log = logging.getLogger("llama_fn.compat")


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Aten ops that inductor does not lower as they are, and what they mean in terms of ops that it does."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


@dataclass(frozen=True)
class CompiledGraph:
    """`run` takes the flat inputs; `code` is what it runs, in `file`, and `key` what inductor's cache knows it by, ""
    where it keeps nothing."""

    run: Callable[..., Any]
    from_cache: bool
    code: str
    key: str
    file: Path | None


def inductor_compile(
    gm: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    patches: dict[str, Any],
    static: Sequence[int],
    units: int,
    cached: bool,
    ranges: AbstractContextManager[None] | None = None,
) -> CompiledGraph:
    """What inductor makes of a graph, or loads from its cache on disk.

    `gm` must already be what inductor lowers: functional aten without what inductor_decompositions() lists, but for
    copies into inputs at its end. So the graph goes to inductor's inner compiler as it is. AOTAutograd and the passes
    after it, which find nothing to do in such a graph and take time that grows with the number of layers, are left
    out. `static` are the inputs that keep their memory from call to call, as CUDA graphs want of any that are written;
    the others are copied into memory of the CUDA graph's own.
    C++ kernels are built as `units` files at once. `ranges` is ranges_in_code(...) for code that is to be profiled.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx, config
    from torch._inductor.codecache import get_path
    from torch._inductor.output_code import CompiledFxGraph

    # Of any node: a function need not have inputs.
    mode = next(v.fake_mode for node in gm.graph.nodes if isinstance(v := node.meta.get("val"), FakeTensor))
    counts = counters["inductor"]
    hits, skipped = counts["fxgraph_cache_hit"], counts["fxgraph_cache_bypass"]
    settings = config.patch({"fx_graph_cache": cached, **patches})
    with (
        torch.no_grad(),
        settings,
        _no_detours(mode),
        _CppKernels.together(units),
        ranges or nullcontext(),
    ):
        compiled = compile_fx.compile_fx_inner(gm, list(inputs), static_input_idxs=tuple(static), is_inference=True)
    if counts["fxgraph_cache_bypass"] > skipped:
        log.warning("inductor does not keep this graph on disk; every start compiles it again")

    def run(*args: torch.Tensor) -> Any:
        return compiled(list(args))

    if not isinstance(compiled, CompiledFxGraph):  # a graph without ops needs no code
        return CompiledGraph(run, False, "", "", None)
    key, file = compiled._fx_graph_cache_key or "", Path(get_path(compiled.cache_key, "py")[2])
    return CompiledGraph(
        run, counts["fxgraph_cache_hit"] > hits, compiled.source_code, key, file if cached and key else None
    )  # fmt: skip


@contextlib.contextmanager
def _no_detours(mode: Any) -> Iterator[None]:
    """Leave out what inductor would do or find out again, each for a second or more of a cold start.

    The graph needs no passes, and its nodes have their values. The vector instructions that the CPU lists are there (a
    compiler too old for them says so itself); which of them to use is asked a thousand times. An index without
    division needs no simplification for its stride to be read. One table of dtype rules, a singleton, is filled again
    at each of thousands of uses.
    """
    from torch._inductor import compile_fx, config, cpu_vec_isa, dtype_propagation, sizevars
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    simplify = sizevars.simplify_index_in_vec_range

    def simplify_divided(index: Any, var: Any, vec_length: int) -> Any:
        return simplify(index, var, vec_length) if index.has(FloorDiv, ModularIndexing) else index

    rules = dtype_propagation.DtypePropagationOpsHandler
    rules()
    # (where, what, meanwhile); inductor's cache asks for symbolic shapes, though here all are numbers.
    replaced: list[tuple[Any, str, Any]] = [
        (mode, "shape_env", ShapeEnv()),
        (compile_fx, "fake_tensor_prop", lambda *_: mode),
        (cpu_vec_isa.VecISA, "check_build", lambda *_: True),
        (cpu_vec_isa, "pick_vec_isa", functools.cache(cpu_vec_isa.pick_vec_isa)),
        (sizevars, "simplify_index_in_vec_range", simplify_divided),
        (rules, "__init__", lambda _: None),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch({"use_post_grad_passes": False}))
        stack.enter_context(torch._guards.tracing(torch._guards.TracingContext(mode)))
        for where, name, meanwhile in replaced:
            stack.enter_context(mock.patch.object(where, name, meanwhile))
        yield


@dataclass(frozen=True)
class _Asked:
    """The place of a kernel that is not built yet."""

    index: int


class _CppKernels:
    """Stands in for inductor's compilation of single C++ kernels: collects all of a graph, then builds them at once.

    Inductor's generated module first asks for every kernel, which gives it a number here, and then waits for all of
    them: the wait builds. Inductor's own wait looks for results that are outstanding only where it may compile with
    several threads, so it is not left to it: one CPU, or TORCHINDUCTOR_COMPILE_THREADS=1, must do.
    """

    def __init__(self, units: int) -> None:
        self.units = units
        self.asked: list[tuple[Sequence[str], str]] = []
        self.built: list[Callable[..., Any]] = []

    @classmethod
    @contextlib.contextmanager
    def together(cls, units: int) -> Iterator[None]:
        from torch._inductor import config
        from torch._inductor.async_compile import AsyncCompile

        kernels, wait = cls(units), AsyncCompile.wait

        def wait_for_all(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
            kernels.put_into(scope)
            wait(compiler, scope)

        with (
            config.patch({"cpp_cache_precompile_headers": False}),
            mock.patch.object(AsyncCompile, "cpp_pybinding", lambda _, types, source: kernels.ask(types, source)),
            mock.patch.object(AsyncCompile, "wait", wait_for_all),
        ):
            yield

    def ask(self, types: Sequence[str], source: str) -> _Asked:
        self.asked.append((types, source))
        return _Asked(len(self.asked) - 1)

    def put_into(self, scope: dict[str, Any]) -> None:
        """Replace what was asked for in the variables of the generated module by the kernels."""
        outstanding = {name: value.index for name, value in scope.items() if isinstance(value, _Asked)}
        if outstanding and len(self.built) < len(self.asked):
            self.build()
        scope.update({name: self.built[index] for name, index in outstanding.items()})

    def build(self) -> None:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        groups = cpp.group([source for _, source in self.asked], self.units)
        units = [cpp.translation_unit([self.asked[i] for i in group]) for group in groups]
        with ThreadPoolExecutor(len(units)) as pool:
            loads = [CppPythonBindingsCodeCache.load_async(unit, submit_fn=pool.submit) for unit in units]
            modules = [load() for load in loads]
        kernels = {i: getattr(m, f"f{k}") for g, m in zip(groups, modules, strict=True) for k, i in enumerate(g)}
        self.built = [kernels[i] for i in range(len(self.asked))]


def missing_tool(kind: str) -> str:
    """What inductor needs on this machine to build kernels for a device of `kind` and does not find, "" for nothing."""
    if kind == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except (RuntimeError, OSError):  # nothing that answers to --version
            return f"a C++ compiler, and {os.environ.get('CXX') or 'g++'} (CXX) cannot be run"
        header = Path(sysconfig.get_path("include")) / "Python.h"
        return "" if header.is_file() else f"Python's headers, and {header} is missing"
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return "" if any(map(shutil.which, names)) else f"a C compiler, by Triton, and there is no {' or '.join(names)}"


def keep_compiled_code(folder: Path) -> Path:
    """Let inductor keep what it compiles in `folder`, apart by the text of the files here; returns where.

    These change the code that inductor writes, which inductor's own key cannot know: code of another version of them
    must not be found. Finding code runs it and unpickles: the folder must be the user's own.
    """
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    version = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / version)
    return folder / version
