"""Collectives stand where their values are used or made; the numbers do not change."""

from __future__ import annotations

import torch

from llama_fn import arrays, ir, random, stages, train_step, tree
from sharding import Mesh

MESH = Mesh.parse("data:2,model:2")


def lowered_pair(cfg):
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    traced = step.trace(train_step.abstract_state(cfg), train_step.abstract_batch(cfg))
    return traced.lower(MESH, "fsdp_tp"), traced.lower(MESH, "fsdp_tp", without=("schedule",))


def positions(lowered, scope, phase):
    nodes = ir.calls(lowered.graph_module.graph)
    return [i for i, n in enumerate(nodes) if scope in f"{ir.scope_of(n)}/" and ir.phase_of(n) == phase]


def test_gathers_stand_one_layer_ahead_and_reductions_right_behind(tiny_config, with_data):
    cfg = with_data(tiny_config(num_layers=4), microbatches=1)
    scheduled, plain = lowered_pair(cfg)
    for layer in range(1, 4):
        gather = positions(scheduled, f"gather/layers/{layer}/", "forward")
        before = positions(scheduled, f"microbatch/0/layers/{layer - 1}/", "forward")
        assert max(gather) < min(before)
        if layer > 1:
            assert min(gather) > max(positions(scheduled, f"microbatch/0/layers/{layer - 2}/", "forward"))
    for layer in range(1, 4):
        reduce = positions(scheduled, f"reduce/layers/{layer}/", "backward")
        assert min(reduce) > max(positions(scheduled, f"microbatch/0/layers/{layer}/", "backward"))
        assert min(reduce) < min(positions(scheduled, f"microbatch/0/layers/{layer - 1}/", "backward"))
    assert max(positions(plain, "gather/", "forward")) < min(positions(plain, "microbatch/0/layers/0/", "forward"))
    assert sorted(map(str, scheduled.collectives())) == sorted(map(str, plain.collectives()))


def test_the_numbers_stay_and_the_peak_does_not_grow(tiny_config, with_data, random_batch):
    cfg = with_data(tiny_config(num_layers=4, embed_dim=64, mlp_dim=128), microbatches=1)
    results = []
    for lowered in lowered_pair(cfg):
        compiled = lowered.compile("interpret")
        state = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
        for i in range(2):
            state, metrics = compiled(state, random_batch(cfg, i))
        results.append((state, metrics, lowered.memory_analysis().peak_bytes))
    (a, ma, peak), (b, mb, plain_peak) = results
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves((a, ma)), tree.leaves((b, mb)), strict=True))
    assert peak <= plain_peak
