"""Code that inductor wrote for a CPU, without inductor: importing that takes longer than all else of a warm start.

Such a module calls its kernels, a handful of products under torch's own names, and what allocates and views memory. It
is taken as it is but for its imports of inductor and the sources of its kernels, which are compiled already.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llama_fn.compat.cpp_units import MODULE

_ADDRESS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"  # where kernels look for what reads a tensor's address
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_COMPILER = "async_compile"
_FOR_BENCHMARKS = ("get_args", "benchmark_compiled_module")


@dataclass(frozen=True)
class PlainCode:
    """`kernels`: by their names in `source`, the extension module and the function in it."""

    source: str
    kernels: Mapping[str, tuple[Path, str]]


def plain(code: str, kernels: Mapping[str, tuple[Path, str]]) -> PlainCode | None:
    """What `code` does without inductor, or None where it needs more of it than kernels and products."""
    tree = ast.parse(code)
    tree.body = [statement for statement in tree.body if not _is_inductors(statement)]
    known = {*_given(tree), *kernels, "extern_kernels", *dir(builtins)}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    products = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "extern_kernels"
    }
    return PlainCode(ast.unparse(tree), kernels) if used <= known and products <= set(_PRODUCTS) else None


def _is_inductors(statement: ast.stmt) -> bool:
    """Whether a statement imports inductor, has it compile, or is there for benchmarks alone."""
    if isinstance(statement, ast.ImportFrom):
        return (statement.module or "").startswith("torch._inductor")
    if isinstance(statement, ast.FunctionDef):
        return statement.name in _FOR_BENCHMARKS
    if isinstance(statement, ast.If):  # the module as a program
        return True
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return bool(names & {_COMPILER, "AsyncCompile"}) and not isinstance(statement, ast.ClassDef)


def _given(tree: ast.Module) -> set[str]:
    """Every name that the module or a function of it sets or imports, parameters included."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imports = (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
    return names | {each.asname or each.name for node in imports for each in node.names}


def loaded(code: PlainCode) -> Callable[[list[torch.Tensor]], Any]:
    """The function that the code defines; it takes its arguments in a list, which it empties. ImportError where a
    kernel cannot be loaded."""
    os.environ[_ADDRESS] = str(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]
    modules = {file: _module(file) for file, _ in code.kernels.values()}
    scope: dict[str, Any] = {name: getattr(modules[file], f) for name, (file, f) in code.kernels.items()}
    scope["extern_kernels"] = SimpleNamespace(**{name: getattr(torch, name) for name in _PRODUCTS})
    exec(compile(code.source, "<kept step>", "exec"), scope)
    run: Callable[[list[torch.Tensor]], Any] = scope["call"]
    return run


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"{file.name.split('.')[0]}.{MODULE}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same_products(extern_kernels: Any) -> bool:
    """Whether inductor's names for products are torch's own, as `loaded` takes them to be."""
    return all(getattr(extern_kernels, name) is getattr(torch, name) for name in _PRODUCTS)
