"""Fused products and collectives: the same numbers, the same bytes, and a reason for what is not fused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.model import arrays, random, train_step
from sharding import Mesh


@pytest.fixture
def traced(tiny_config, with_data):
    shape = {"embed_dim": 256, "mlp_dim": 512, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 64}
    cfg = with_data(tiny_config(compute_dtype="bf16", **shape), global_batch_size=1, seq_len=16)
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    return cfg, step.trace(*train_step.abstract_arguments(cfg))


def ran(cfg, lowered, random_inputs):
    step, state = lowered.compile("interpret"), arrays.materialize(train_step.abstract_state(cfg), random.key(0))
    for i in range(2):
        state, metrics = step(state, *random_inputs(cfg, i))
    return metrics, tree.leaves(state.params)


def test_fused_equals_unfused(traced, random_inputs):
    cfg, trace = traced
    plain, fused = (trace.lower(Mesh.parse("model:2"), "tp_sp", fuse=f) for f in (False, True))
    want, want_params = ran(cfg, plain, random_inputs)
    got, params = ran(cfg, fused, random_inputs)
    for name in want:
        assert got[name].item() == pytest.approx(want[name].item(), rel=5e-3), name
    for a, b in zip(params, want_params, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 2e-2 * torch.linalg.vector_norm(b)


def test_the_table_keeps_the_bytes_and_names_the_fused_op(traced):
    _, trace = traced
    plain, fused = (trace.lower(Mesh.parse("model:2"), "tp_sp", fuse=f) for f in (False, True))
    total = lambda lowered: sum(r.bytes * r.count for r in lowered.collectives())  # noqa: E731
    assert total(fused) == total(plain)
    kinds = {r.kind for r in fused.collectives()}
    assert {"all_gather_matmul", "matmul_reduce_scatter"} <= kinds
    assert not {"all_gather_matmul", "matmul_reduce_scatter"} & {r.kind for r in plain.collectives()}
    assert fused.cost_analysis().total_flops == plain.cost_analysis().total_flops


def test_the_dump_says_what_was_fused_and_why_not(traced, tiny_config, with_data):
    _, trace = traced
    text = trace.lower(Mesh.parse("model:2"), "tp_sp", fuse=True).as_text()
    assert "2 in microbatch/*/layers/*/mlp, forward: fused into all_gather_matmul" in text
    assert "2 in microbatch/*/layers/*/mlp, forward: fused into matmul_reduce_scatter" in text
    assert "layers/*/attention, forward: not fused: inner size 128 is not within 256..65534" in text
    assert "not fused: what it sums is not a product" in text
    cfg = replace(with_data(tiny_config(), global_batch_size=4))
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    trace = step.trace(*train_step.abstract_arguments(cfg))
    text = trace.lower(Mesh.parse("model:2"), "tp_sp", fuse=True).as_text()
    assert "not fused: float32, and the fused op takes float16 and bfloat16" in text
