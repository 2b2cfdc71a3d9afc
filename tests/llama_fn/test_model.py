"""The model against transformers' LlamaForCausalLM, and its parameter counts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_fn import tree
from llama_fn.config import ModelConfig
from llama_fn.model import arrays, llama, random, weights
from llama_fn.model.presets import PRESETS, preset

COUNTS = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_33b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama_65b_8layers": 7_000_432_640,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    m = preset(name)
    h, kv = m.embed_dim // m.num_heads, m.num_kv_heads
    attention = 2 * m.embed_dim**2 + 2 * m.embed_dim * kv * h
    by_hand = m.num_layers * (attention + 3 * m.embed_dim * m.mlp_dim + 2 * m.embed_dim)
    by_hand += 2 * m.vocab_size * m.embed_dim + m.embed_dim
    assert arrays.total_size(llama.abstract_params(m)) == COUNTS.get(name, by_hand) == by_hand


CHANGES = [
    {"norm_eps": 1e-6},
    {"num_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 500000.0},
    {"num_kv_heads": 1, "rope_theta": 100.0, "fused_head": True},
    {"tie_embeddings": True},
]


def changed(change):
    """A small model with one thing changed: its config, parameters, tokens and targets, the same at every call."""
    tiny = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=48, vocab_size=64)
    cfg = replace(tiny, init_std=0.2, **change)
    torch.manual_seed(CHANGES.index(change))
    params = arrays.materialize(llama.abstract_params(cfg), random.key(3))
    params = tree.map(lambda p: p + 0.1 * torch.randn_like(p), params)
    ids = torch.randint(0, cfg.vocab_size, (3, 20))
    return cfg, params, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@pytest.fixture(scope="module")
def transformers_answers(tmp_path_factory):
    """The folder of what transformers computes for every change: one process imports it once."""
    folder, cases = tmp_path_factory.mktemp("transformers"), []
    for i, change in enumerate(CHANGES):
        cfg, params, tokens, targets = changed(change)
        given = {**tree.by_path(params), "tokens": tokens, "targets": targets}
        np.savez(folder / f"in_{i}.npz", **{name: value.numpy() for name, value in given.items()})
        cases.append([f"in_{i}.npz", f"out_{i}.npz", asdict(cfg)])
    (folder / "oracle.py").write_text(Path(__file__).with_name("hf_oracle.py").read_text())
    subprocess.run([sys.executable, "oracle.py", json.dumps(cases)], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_logits_loss_and_gradients_equal_transformers(change, transformers_answers):
    cfg, params, tokens, targets = changed(change)

    def gathered(params):
        return weights.gather(params, llama.abstract_params(cfg))

    def loss_fn(*leaves):
        return llama.nll(gathered(tree.unflatten(spec, leaves)), tokens, targets, cfg=cfg).mean()

    leaves, spec = tree.flatten(params)
    logits = llama.logits(gathered(params), tokens, cfg=cfg)
    loss, pull = torch.func.vjp(loss_fn, *leaves)
    grads = dict(zip(tree.paths(params), pull(torch.ones(())), strict=True))
    answers = np.load(transformers_answers / f"out_{CHANGES.index(change)}.npz")
    want = {name: torch.from_numpy(a) for name, a in answers.items()}

    def error(a, b):
        return ((a - b).norm() / b.norm()).item()

    assert error(logits, want.pop("logits")) < 2e-6
    assert error(loss, want.pop("loss")) < 1e-6
    assert set(want) == set(grads)
    for name, theirs in want.items():
        assert error(grads[name], theirs) < 5e-6, name


def test_initial_loss_is_log_vocab_plus_half_the_logit_variance():
    cfg = replace(preset("llama_tiny"), init_scaled=False)
    params = arrays.materialize(llama.abstract_params(cfg), random.key(1))
    ids = torch.randint(0, cfg.vocab_size, (2, 65))
    loss = llama.nll(weights.gather(params, llama.abstract_params(cfg)), ids[:, :-1], ids[:, 1:], cfg=cfg).mean().item()
    expected = math.log(cfg.vocab_size) + cfg.embed_dim * cfg.init_std**2 / 2
    assert abs(loss / expected - 1) < 0.02


def test_a_shard_draws_the_same_numbers_as_the_whole():
    key, shape = random.fold_in(random.key(0), "layers.wq"), (3, 400, 500)
    whole = random.normal(key, shape, 0.5, torch.float32)
    for at in ((slice(1, 3), slice(0, 400), slice(0, 500)), (slice(0, 3), slice(100, 300), slice(499, 500))):
        assert torch.equal(random.normal(key, shape, 0.5, torch.float32, at), whole[at])
    assert abs(whole.std().item() - 0.5) < 0.002 and abs(whole.mean().item()) < 0.002
