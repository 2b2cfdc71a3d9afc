"""The floors of the house, read from the sources: who may import whom, and where private torch may stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("sharding/**/*.py"), *ROOT.glob("llama_fn/**/*.py")])
# The rooms of llama_fn from the ground up, as in ../docs and DESIGN: each may import those before it.
FLOORS = (
    "ground", "compat", "model", "ascend", "distributed", "data", "compiler", "checkpoint", "planner", "inspect", "run",
    "operations", "tools",
)  # fmt: skip
GROUND_FILES = 13
LONGEST = 300  # lines that a file may have, tests too


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


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """ "ground" for what stands in llama_fn itself."""
    name = [*module.split("."), ""][1]
    return name if (ROOT / "llama_fn" / name).is_dir() and name else "ground"


def modules_imported(path: Path) -> set[str]:
    """Those of the project's modules that a file imports, wherever in it."""
    return {name for name in imported(path) if name in MODULES}


MODULES = {module_of(path): path for path in SOURCES}
OURS = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "llama_fn"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_lower_floors(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = {"kernels": {"sharding", "llama_fn", "train"}, "sharding": {"llama_fn", "train"}, "llama_fn": {"train"}}
    assert not floors(imported(path)) & forbidden[package]
    assert "transformers" not in floors(imported(path))


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_lower_rooms(path):
    own = room_of(module_of(path))
    for name in modules_imported(path):
        if name.startswith("llama_fn.") and room_of(name) != own:
            assert FLOORS.index(room_of(name)) < FLOORS.index(own), f"{path}: {name} stands above {own}"


def test_maths_and_compiler_do_not_import_each_other():
    """But for the declarations of arrays, in whose terms the compiler speaks of arguments."""
    for path in OURS:
        names = modules_imported(path)
        if room_of(module_of(path)) == "model":
            assert not [n for n in names if room_of(n) in ("compiler", "compat") and n.startswith("llama_fn.")], path
        if room_of(module_of(path)) == "compiler":
            maths = {n for n in names if room_of(n) == "model" and n.startswith("llama_fn.")}
            assert maths <= {"llama_fn.model", "llama_fn.model.arrays"}, path


def test_no_circle_of_imports():
    names = {module: modules_imported(path) - {module} for module, path in MODULES.items()}
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    left = {m: {n for n in found if not (n in packages and m.startswith(n + "."))} for m, found in names.items()}
    while free := [m for m, found in left.items() if not found & set(left)]:
        for module in free:
            del left[module]
    assert not left, f"these import one another: {sorted(left)}"


def test_the_ground_is_small_and_rooms_say_what_they_are_for():
    assert len(list((ROOT / "llama_fn").glob("*.py"))) <= GROUND_FILES
    for room in FLOORS[1:]:
        words = ast.get_docstring(ast.parse((ROOT / "llama_fn" / room / "__init__.py").read_text()))
        assert words and (room in ("compat", "tools") or ("May import" in words and "Read " in words)), room


def test_no_file_is_too_long_to_be_read_in_one_go():
    lines = {path: len(path.read_text().splitlines()) for path in [*SOURCES, *ROOT.glob("tests/**/*.py")]}
    assert not {str(path): count for path, count in lines.items() if count > LONGEST}


def test_no_two_test_files_share_a_name():
    """pytest imports them by their names alone; `make test` would refuse to run the second."""
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert not {name for name in names if names.count(name) > 1}


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
