"""Inductor: compiling a graph that is already what it lowers, with what costs time and gives nothing left out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from llama_fn import progress
from llama_fn.compat import cpp_units as cpp
from llama_fn.compat.inductor_fusion import sums_in_loops
from llama_fn.compat.plain_code import PlainCode, plain, same_products

log = logging.getLogger("llama_fn.compat")
CODE = 0.4  # of the time that inductor takes, the rest is the C++ compiler's


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Aten ops that inductor does not lower as they are, and what they mean in terms of ops that it does."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


@dataclass(frozen=True)
class GraphSource:
    """A graph to compile. It must already be what inductor lowers: functional aten without what
    inductor_decompositions() lists, but for copies into inputs at its end.

    `static` are the inputs that keep their memory from call to call, as CUDA graphs want of any that are written; the
    others are copied into memory of the CUDA graph's own. `ranges` is ranges_in_code(...) for code that is to be
    profiled.
    """

    gm: torch.fx.GraphModule
    inputs: Sequence[torch.Tensor]
    static: Sequence[int] = ()
    ranges: AbstractContextManager[None] | None = None


@dataclass(frozen=True)
class CompiledGraph:
    """`run` takes the flat inputs in a list, which it empties; `code` is what it runs, in `file`, and `key` what
    inductor's cache knows it by, "" where it keeps nothing. `plain`: the code for a start without inductor, if that is
    possible."""

    run: Callable[[list[torch.Tensor]], Any]
    from_cache: bool
    code: str
    key: str
    file: Path | None
    plain: PlainCode | None = None


def inductor_compile(
    sources: Sequence[GraphSource], patches: dict[str, Any], units: int, cached: bool
) -> list[CompiledGraph]:
    """What inductor makes of graphs, or loads from its cache on disk.

    They go to inductor's inner compiler as they are. AOTAutograd and the passes after it, which find nothing to do in
    such graphs and take time that grows with the number of layers, are left out. C++ kernels of all the graphs are
    built together as `units` files, a kernel that several have once.
    """
    from torch._inductor import config

    if not sources:  # a function that gives back what it is given
        return []
    # Of any node: a function need not have inputs.
    nodes = (node for source in sources for node in source.gm.graph.nodes)
    mode = next(v.fake_mode for node in nodes if isinstance(v := node.meta.get("val"), FakeTensor))
    settings = config.patch({"fx_graph_cache": cached, **patches})
    building = _CppKernels.together(units)
    with torch.no_grad(), settings, _no_detours(mode), sums_in_loops(), building as kernels, progress.span(0.0, CODE):
        made = [_compiled(source, cached) for source in progress.tracked(sources)]
    return [
        replace(each, plain=_plain(each, kernels)) if each.file and source.ranges is None else each
        for each, source in zip(made, sources, strict=True)
    ]


def _plain(graph: CompiledGraph, kernels: _CppKernels) -> PlainCode | None:
    """The code of a graph for a start without inductor, or None where inductor does more than to run it."""
    from torch._inductor.select_algorithm import extern_kernels

    compiled: Any = graph.run
    alone = not compiled.constants and not compiled.inputs_to_check and compiled.device_types <= {"cpu"}
    if not alone or not same_products(extern_kernels):
        return None
    return plain(graph.code, kernels.where.get(str(graph.file), {}))


def _compiled(source: GraphSource, cached: bool) -> CompiledGraph:
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx
    from torch._inductor.codecache import get_path
    from torch._inductor.output_code import CompiledFxGraph

    counts = counters["inductor"]
    hits, skipped = counts["fxgraph_cache_hit"], counts["fxgraph_cache_bypass"]
    # Another graph reads the results as they were traced, so their strides are not inductor's to choose.
    results = next(iter(reversed(source.gm.graph.nodes)))
    results.meta["user_visible_output_idxs"] = list(range(len(results.args[0])))
    with source.ranges or nullcontext():
        compiled = compile_fx.compile_fx_inner(
            source.gm, list(source.inputs), static_input_idxs=tuple(source.static), is_inference=True
        )
    if counts["fxgraph_cache_bypass"] > skipped:
        log.warning("inductor does not keep this graph on disk; every start compiles it again")
    if not isinstance(compiled, CompiledFxGraph):  # a graph without ops needs no code
        return CompiledGraph(compiled, False, "", "", None)
    key, file = compiled._fx_graph_cache_key or "", Path(get_path(compiled.cache_key, "py")[2])
    hit = counts["fxgraph_cache_hit"] > hits
    return CompiledGraph(compiled, hit, compiled.source_code, key, file if cached and key else None)


@contextlib.contextmanager
def _no_detours(mode: Any) -> Iterator[None]:
    """Leave out what inductor would do or find out again, each for a second or more of a cold start.

    The graph needs no passes, and its nodes have their values. The vector instructions that the CPU lists are there (a
    compiler too old for them says so itself); which of them to use is asked a thousand times. An index without
    division needs no simplification for its stride to be read. One table of dtype rules, a singleton, is filled again
    at each of thousands of uses.
    """
    from torch._inductor import compile_fx, config, cpu_vec_isa, dtype_propagation, sizevars
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
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
    """Stands in for inductor's compilation of single C++ kernels: collects those of all graphs, then builds them at
    once.

    Inductor's generated module first asks for every kernel, which gives it a number here, and then waits for all of
    them. Inductor's own wait looks for results that are outstanding only where it may compile with several threads, so
    it is not left to it: one CPU, or TORCHINDUCTOR_COMPILE_THREADS=1, must do. Modules get their kernels at the end.
    """

    def __init__(self) -> None:
        self.asked: dict[tuple[tuple[str, ...], str], _Asked] = {}
        self.modules: list[dict[str, Any]] = []
        self.where: dict[str, dict[str, tuple[Path, str]]] = {}  # kernels by module and name: file and function

    @classmethod
    @contextlib.contextmanager
    def together(cls, units: int) -> Iterator[_CppKernels]:
        from torch._inductor import config
        from torch._inductor.async_compile import AsyncCompile

        kernels, wait = cls(), AsyncCompile.wait

        def wait_for_others(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
            kernels.modules.append(scope)
            wait(compiler, scope)

        with (
            config.patch({"cpp_cache_precompile_headers": False}),
            mock.patch.object(AsyncCompile, "cpp_pybinding", lambda _, types, source: kernels.ask(types, source)),
            mock.patch.object(AsyncCompile, "wait", wait_for_others),
        ):
            yield kernels
            if kernels.asked:
                with progress.span(CODE, 1.0, "compiling kernels"):
                    kernels.put_into_modules(kernels.built(units))

    def ask(self, types: Sequence[str], source: str) -> _Asked:
        return self.asked.setdefault((tuple(types), source), _Asked(len(self.asked)))

    def put_into_modules(self, built: Sequence[tuple[Path, str, Callable[..., Any]]]) -> None:
        """Replace what was asked for in the variables of the generated modules by the kernels."""
        for scope in self.modules:
            mine = {name: built[value.index] for name, value in scope.items() if isinstance(value, _Asked)}
            scope |= {name: kernel for name, (_, _, kernel) in mine.items()}
            self.where[scope["__file__"]] = {name: (file, function) for name, (file, function, _) in mine.items()}

    def built(self, units: int) -> list[tuple[Path, str, Callable[..., Any]]]:
        """The kernels, in the order in which they were asked for: file, name in it, and function."""
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        asked = list(self.asked)
        groups = cpp.group([source for _, source in asked], units)
        texts = [cpp.translation_unit([asked[i] for i in group]) for group in groups]
        with ThreadPoolExecutor(len(texts)) as pool:
            loads = [CppPythonBindingsCodeCache.load_async(text, submit_fn=pool.submit) for text in texts]
            modules = [load() for load in progress.tracked(loads)]
        kernels = {
            i: (Path(m.__file__), f"f{k}", getattr(m, f"f{k}"))
            for g, m in zip(groups, modules, strict=True)
            for k, i in enumerate(g)
        }
        return [kernels[i] for i in range(len(asked))]


def missing_tool(kind: str) -> str:
    """What inductor needs on this machine to build kernels for a device of `kind` and does not find, "" for nothing."""
    if kind == "cpu":
        compiler = os.environ.get("CXX") or "g++"  # as inductor does; asking it would import it, for a second
        try:
            subprocess.run([compiler, "--version"], check=True, capture_output=True)
        except (subprocess.CalledProcessError, OSError):
            return f"a C++ compiler, and {compiler} (CXX) cannot be run"
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
