"""docs/adding.md: its three lines, put into a copy of the model, train alike on one device and on four."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import dataclasses
import torch
from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.config import Config, DataConfig, ModelConfig
from llama_fn.model import arrays, llama, optim, random, train_step
from sharding import Mesh

model = ModelConfig(
    num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48, vocab_size=64, compute_dtype="fp64"
)
cfg = Config(model=model, data=DataConfig(seq_len=16, global_batch_size=4))
infos = llama.abstract_params(model)
assert infos.layers.o_norm.shape == (2, 8) and not optim.matrices(infos).layers.o_norm
traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(
    *train_step.abstract_arguments(cfg))
ids = torch.randint(0, 64, (1, 4, 17), generator=torch.Generator().manual_seed(0))
batch = train_step.Batch(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), torch.ones(1, 4, 16))


def trained(mesh):
    step = traced.lower(Mesh.parse(mesh), "fsdp_tp").compile("interpret")
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
    for _ in range(3):
        state, metrics = step(state, batch, train_step.hyperparameters(cfg))
    return state, metrics


(one, loss), (four, same) = trained(""), trained("data:2,model:2")
torch.testing.assert_close(same, loss, rtol=1e-10, atol=1e-12)
for a, b in zip(tree.leaves(four), tree.leaves(one), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
assert (one.params.layers.o_norm != 1).all(), "the norm is trained"
"""


def added_lines(source: str, diff: str) -> str:
    """`source` with the lines that begin with + put behind the line before them, which must be there once."""
    before = ""
    for line in diff.splitlines():
        if not line.startswith("+"):
            before = line[1:]
            continue
        assert source.count(f"\n{before}\n") == 1, f"{before!r} does not stand in llama.py just once"
        source = source.replace(f"\n{before}\n", f"\n{before}\n{line[1:]}\n")
        before = line[1:]
    return source


@pytest.fixture
def copy(tmp_path):
    for package in ("kernels", "sharding", "llama_fn"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_three_lines_of_a_norm_train_alike_on_one_device_and_on_four(copy):
    page = (ROOT / "docs" / "adding.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", page, re.S)
    assert len(re.findall(r"^\+", diff, re.M)) == 3
    model = copy / "llama_fn" / "model" / "llama.py"
    model.write_text(added_lines(model.read_text(), diff))
    (copy / "worker.py").write_text(WORKER)
    out = subprocess.run(
        [sys.executable, "worker.py"], cwd=copy, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert out.returncode == 0, out.stderr
