"""What looks like a mistake is named by one lint with scope, line and remedy; a good step has none."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels as k
from llama_fn.compiler import stages
from llama_fn.compiler.lints import lints
from llama_fn.model import llama, train_step
from llama_fn.model.transforms import named_scope, value_and_grad
from llama_fn.planner import config_stages
from sharding import Mesh

ROOT = Path(__file__).resolve().parents[2]


def of(cfg, remat="none", mesh=""):
    step = config_stages.train(cfg)
    return lints(step.lower(Mesh.parse(mesh), remat=remat), remat)


@pytest.mark.parametrize(
    ("dtype", "remat", "mesh"),
    [("fp32", "none", ""), ("bf16", "full", ""), ("bf16", "dots", "data:2,model:2"), ("fp16", "none", "data:2")],
)
def test_a_good_step_has_none(dtype, remat, mesh, tiny_config):
    cfg = tiny_config(compute_dtype=dtype)
    assert of(replace(cfg, data=replace(cfg.data, microbatches=2)), remat, mesh) == []


def test_a_product_in_float32_of_a_step_in_16_bits_is_named(tiny_config, monkeypatch):
    def wide(p, x, *, cfg):
        n = k.rms_norm(x, p.mlp_norm, cfg.norm_eps)[0]
        h = k.swiglu(
            k.einsum("btd,df->btf", n.float(), p.w_gate.float()).bfloat16(), k.einsum("btd,df->btf", n, p.w_up)
        )
        return x + k.einsum("btf,fd->btd", h, p.w_down)

    monkeypatch.setattr(llama, "mlp_block", wide)
    (lint,) = of(tiny_config(compute_dtype="bf16"))
    assert lint.kind == "dtype" and "layers/*" in lint.text and "test_lints.py:" in lint.text and "Cast" in lint.text
    assert of(tiny_config()) == [], "in float32 it is as all others are"


def test_state_that_is_not_donated_is_named(tiny_config):
    cfg = tiny_config()
    arguments = train_step.abstract_arguments(cfg)
    (lint,) = lints(stages.jit(train_step.make_train_step(cfg)).trace(*arguments).lower())
    assert lint.kind == "donation" and lint.text.startswith("state comes back") and "donate=0" in lint.text


def test_a_policy_that_finds_nothing_to_recompute_is_named(tiny_config, monkeypatch):
    monkeypatch.setattr(llama, "remat", lambda fn: fn)
    (lint,) = of(tiny_config(), "full")
    assert lint.kind == "remat" and "transforms.remat" in lint.text


def test_another_attention_scale_is_a_note(tiny_config, monkeypatch):
    attention = k.attention
    monkeypatch.setattr(k, "attention", lambda q, key, v, scale, *more: attention(q, key, v, 0.5, *more))
    (lint,) = of(tiny_config())
    assert lint.note and "0.5, and head_dim^-0.5 is 0.353553: " in lint.text and "layers/*/attention" in lint.text


class OwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(x, w):
        return k.einsum("bd,df->bf", x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return None, k.einsum("bd,bf->df", ctx.saved_tensors[0], g)


def test_a_backward_that_lost_its_scope_is_named():
    def loss_of(w, x):
        with named_scope("mine"):
            return OwnBackward.apply(x, w).sum()

    def step(state, x):
        loss, grad = value_and_grad(lambda w: loss_of(w, x))(state["w"])
        return {"w": state["w"] - grad, "n": state["n"] + 1}, loss

    arguments = {"w": torch.ones(4, 3), "n": torch.zeros(())}, torch.ones(2, 4)
    (lint,) = lints(stages.jit(step, donate=0).trace(*arguments).lower())
    assert lint.kind == "scope" and "named_scope" in lint.text


@pytest.mark.slow
def test_strict_makes_an_error_of_it(tmp_path):
    code = (
        "from llama_fn.model import llama\nllama.remat = lambda fn: fn\n"
        "import sys; from absl import app, flags; import train\n"
        "train.define_flags(); app.run(train.main, flags_parser=train.parse)"
    )
    small = [
        "--model.num_layers=1", "--model.vocab_size=400", "--data.seq_len=32", "--run.steps=1", "--run.backend=eager",
        f"--run.workdir={tmp_path}", f"--data.path={ROOT / 'README.md'}", "--run.eval_every=0", "--mesh.remat=full",
    ]  # fmt: skip
    for flags, status in (([], 0), (["--run.strict"], 2)):
        done = subprocess.run([sys.executable, "-c", code, *small, *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and "remat: policy full was asked for" in done.stderr, done.stderr
