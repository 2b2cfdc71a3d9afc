"""The notebooks run from top to bottom, as the percent scripts that they are, and in a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


MISSING = "the extra notebook is missing; runs in make nightly"
CELLS = (
    "import torch, kernels as k\nfrom llama_fn.compiler import stages",
    "def step(x):\n    y = k.einsum('bd,df->bf', x, x)\n    return y * 2",
    "print(stages.jit(step).trace(torch.ones(2, 2)).as_text())",
    "def wrong(x):\n    if x.sum() > 0:\n        return x\n    return -x",
    "stages.jit(wrong).trace(torch.ones(2))",
)


@pytest.fixture
def in_kernel(tmp_path, monkeypatch):
    """Runs a notebook in a kernel, in a folder of its own; returns it with its outputs."""
    nbclient = pytest.importorskip("nbclient", reason=MISSING)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "work/notebook").mkdir(parents=True)

    def run(book, **more):
        resources = {"metadata": {"path": str(tmp_path)}}
        return nbclient.NotebookClient(book, timeout=300, resources=resources, kernel_name="python3", **more).execute()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_a_kernel(notebook, in_kernel):
    book = in_kernel(pytest.importorskip("jupytext", reason=MISSING).read(notebook))
    assert any(cell.get("outputs") for cell in book.cells)


@pytest.mark.slow
def test_ops_and_errors_name_the_cell_and_its_line(in_kernel):
    nbformat = pytest.importorskip("nbformat", reason=MISSING).v4
    book = in_kernel(nbformat.new_notebook(cells=[nbformat.new_code_cell(text) for text in CELLS]), allow_errors=True)
    [graph], [error] = (cell["outputs"] for cell in (book.cells[2], book.cells[4]))
    assert "In[2]:2" in graph["text"] and "In[2]:3" in graph["text"], graph["text"]
    assert "asks for the value of a tensor (In[4]:2)" in error["evalue"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    (tmp_path / "work/notebook").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(notebook)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = notebook.read_text().split("# %%")
    assert cells[1].startswith(" [markdown]\n# # "), "opens with a title"
