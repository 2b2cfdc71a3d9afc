"""The floors of the house, read from the sources: who may import whom, and where private torch may stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("sharding/**/*.py"), *ROOT.glob("llama_fn/**/*.py")])
MATHS = {"model", "optim", "train_step", "transforms"}
COMPILER = {"stages", "passes", "backends", "cost", "dump", "ir", "compat"}


def imported(path: Path) -> set[str]:
    """Dotted names of modules that a file imports, those of `from x import y` as x and x.y."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floors(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def inside(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("llama_fn.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_lower_floors(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = {"kernels": {"sharding", "llama_fn", "train"}, "sharding": {"llama_fn", "train"}, "llama_fn": {"train"}}
    assert not floors(imported(path)) & forbidden[package]
    assert "transformers" not in floors(imported(path))


def test_maths_and_compiler_do_not_import_each_other():
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts
        if parts[0] != "llama_fn":
            continue
        module = parts[1].removesuffix(".py")
        if module in MATHS:
            assert not inside(imported(path)) & COMPILER, path
        if module in COMPILER:
            assert not inside(imported(path)) & MATHS, path


def test_private_torch_symbols_stand_in_compat_only():
    private = re.compile(r"torch[a-z_.]*\._[a-z]")
    for path in SOURCES:
        if path.parent.name != "compat":
            lines = [line for line in path.read_text().splitlines() if private.search(line)]
            assert not lines, (path, lines)


def test_only_the_tree_module_flattens():
    for path in SOURCES:
        if path.name != "tree.py":
            assert "optree" not in floors(imported(path)) and "torch.utils._pytree" not in imported(path), path


def test_flags_are_read_by_programs_alone():
    for path in SOURCES:
        assert path.parent.name == "tools" or "absl.flags" not in imported(path), path


def test_functorch_is_the_one_inside_torch():
    import functorch
    import torch

    assert functorch.__version__ == torch.__version__


def test_kernels_has_a_version():
    import kernels

    assert kernels.__version__
