"""Biases and norms of queries and keys: on every kind of mesh the step of one device, and without weight decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.model import arrays, llama, optim, random, train_step
from llama_fn.planner import config_stages
from sharding import Mesh

MESHES = {
    "data:2,model:2": "fsdp_tp",
    "model:2": "tp_sp",
    "context:2,model:2": "fsdp_tp_ulysses",
    "pipe:2,data:2": "fsdp",
}


@pytest.fixture(scope="module")
def traced():
    from tests.conftest import tiny

    cfg = tiny(compute_dtype="fp64", qkv_bias=True, qk_norm=True, head_size=12, num_kv_heads=4)
    cfg = replace(cfg, data=replace(cfg.data, global_batch_size=8, microbatches=2))
    return cfg, stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg))


@pytest.mark.parametrize("axes", MESHES)
def test_a_step_on_a_mesh_is_that_of_one_device(axes, traced, random_inputs):
    cfg, step = traced
    results = []
    for mesh, rules in (("", "fsdp"), (axes, MESHES[axes])):
        compiled = step.lower(Mesh.parse(mesh), rules).compile("interpret")
        state = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
        for i in range(2):
            state, metrics = compiled(state, *random_inputs(cfg, i))
        results.append((state, metrics))
    (one, loss), (many, same) = results
    torch.testing.assert_close(same, loss, rtol=1e-10, atol=1e-12)
    for path, a, b in zip(tree.paths(one, ""), tree.leaves(many), tree.leaves(one), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=path)
    layers = one.params.layers
    assert all((x != 0).all() for x in (layers.bq, layers.bk, layers.bv)) and (layers.q_norm != 1).all()


def test_neither_is_decayed_and_a_head_may_have_any_size(traced):
    cfg, _ = traced
    infos = llama.abstract_params(cfg.model)
    decayed = optim.matrices(infos).layers
    assert decayed.wq and decayed.wo and not any((decayed.bq, decayed.bk, decayed.bv, decayed.q_norm, decayed.k_norm))
    assert infos.layers.wq.shape == (2, 32, 4, 12) and infos.layers.wo.shape == (2, 4, 12, 32)
    assert config_stages.mesh(cfg).size == 1
