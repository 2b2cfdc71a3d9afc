"""Collectives stand where their values are used or made; the numbers do not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama_fn import tree
from llama_fn.compiler import ir, stages
from llama_fn.errors import UserError
from llama_fn.model import arrays, random, train_step
from sharding import Mesh

MESH = Mesh.parse("data:2,model:2")


PLAIN = ("bucket", "overlap", "schedule")


def lower(cfg, without=()):
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    traced = step.trace(*train_step.abstract_arguments(cfg))
    return traced.lower(MESH, "fsdp_tp", without=without)


def positions(lowered, scope, phase, kind=""):
    nodes = ir.calls(lowered.graph_module.graph)
    return [
        i for i, n in enumerate(nodes)
        if scope in f"{ir.scope_of(n)}/" and ir.phase_of(n) == phase and kind in str(n.target)
    ]  # fmt: skip


def layer(lowered, i, phase):
    return positions(lowered, f"microbatch/0/layers/{i}/", phase)


def test_gathers_start_one_layer_ahead_and_are_waited_for_at_their_layer(tiny_config, with_data):
    cfg = with_data(tiny_config(num_layers=4), microbatches=1)
    scheduled = lower(cfg)
    for i in range(1, 4):
        start = positions(scheduled, f"gather/layers/{i}/", "forward", "_start")
        wait = positions(scheduled, f"gather/layers/{i}/", "forward", "wait")
        assert max(start) < min(layer(scheduled, i - 1, "forward"))
        assert min(wait) > max(layer(scheduled, i - 1, "forward"))
        if i > 1:
            assert min(start) > max(layer(scheduled, i - 2, "forward"))
    plain = lower(cfg, PLAIN)
    assert max(positions(plain, "gather/", "forward")) < min(layer(plain, 0, "forward"))


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_reductions_run_while_the_next_layer_is_computed(dtype, tiny_config, with_data):
    """In bfloat16 the casts to float32, in which gradients are summed, run with them."""
    cfg = with_data(tiny_config(num_layers=4, compute_dtype=dtype), microbatches=1)
    scheduled = lower(cfg)
    for i in range(1, 4):
        start = positions(scheduled, f"reduce/layers/{i}/", "backward", "reduce_scatter_start")
        waits = positions(scheduled, f"reduce/layers/{i}/", "backward", "wait")
        assert max(layer(scheduled, i, "backward")) < min(start) < min(layer(scheduled, i - 1, "backward"))
        assert min(waits) > max(layer(scheduled, i - 1, "backward"))
    plain = lower(cfg, PLAIN)
    assert min(positions(plain, "reduce/", "backward")) > max(layer(plain, 0, "backward"))


def test_weight_gradients_fill_the_time_of_a_layers_reduce_scatter(tiny_config, with_data):
    lowered = lower(with_data(tiny_config(), microbatches=1))
    nodes = ir.calls(lowered.graph_module.graph)
    for name in ("attention", "mlp"):
        scope = f"microbatch/0/layers/1/{name}/"
        (start,) = positions(lowered, scope, "backward", "reduce_scatter_start")
        (wait,) = [i for i, n in enumerate(nodes) if nodes[start] in n.args and "wait" in str(n.target)]
        between = [str(n.target) for n in nodes[start + 1 : wait]]
        assert sum("einsum" in target for target in between) == {"attention": 4, "mlp": 3}[name]


def test_small_collectives_travel_together(tiny_config, with_data):
    cfg = with_data(tiny_config(num_layers=4), microbatches=1)
    together, apart = lower(cfg).collectives(), lower(cfg, ["bucket"]).collectives()
    norm = [r for r in together if r.scope == "optimizer" and r.axis == "data+model"]
    assert [r.count for r in norm] == [1, 1], "one all-reduce for the norm, one for the look at new parameters"
    assert sum(r.count for r in apart if r.scope == "optimizer") > 3
    layers = [r for r in together if r.scope == "gather/layers/*"]
    assert [(r.kind, r.count) for r in layers] == [("all_gather", 4)]
    sent = [sum(r.count * r.bytes for r in rows if r.scope.startswith("gather")) for rows in (together, apart)]
    assert sent[0] == sent[1]


@pytest.mark.slow
def test_the_numbers_stay_and_the_peak_hardly_grows(tiny_config, with_data, random_inputs):
    cfg = with_data(tiny_config(num_layers=4, embed_dim=64, mlp_dim=128), microbatches=1)
    results = []
    for without in (PLAIN, (), ("bucket",), ("overlap",), ("schedule",)):
        lowered = lower(cfg, without)
        compiled = lowered.compile("interpret")
        state = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
        for i in range(2):
            state, metrics = compiled(state, *random_inputs(cfg, i))
        results.append((state, metrics, lowered.memory_analysis().peak_bytes))
    want, want_metrics, plain_peak = results[0]
    for state, metrics, _ in results[1:]:
        pairs = zip(tree.leaves((state, metrics)), tree.leaves((want, want_metrics)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert results[1][2] <= 1.05 * plain_peak, "what is under way is a layer's weights or gradients, no more"


def test_a_pass_that_must_stay_cannot_be_left_out(tiny_config):
    with pytest.raises(UserError, match="'donation' cannot be left out"):
        lower(tiny_config(), ["donation"])


@pytest.mark.slow
def test_gathering_for_every_microbatch_takes_less_memory(tiny_config, with_data):
    """What optim.reduce_per_microbatch promises: weights of one microbatch at a time, gradients in parts."""
    peaks = {}
    for each in (False, True):
        cfg = with_data(tiny_config(num_layers=6, embed_dim=128, mlp_dim=512), microbatches=4, global_batch_size=32)
        cfg = replace(cfg, optim=replace(cfg.optim, reduce_per_microbatch=each))
        step = stages.jit(train_step.make_train_step(cfg), donate=0)
        traced = step.trace(*train_step.abstract_arguments(cfg))
        lowered = traced.lower(Mesh.parse("data:8"), "fsdp")
        peaks[each] = lowered.memory_analysis().temporary_bytes
    assert peaks[True] < 0.8 * peaks[False]
    for i in range(1, 4):
        begun = positions(lowered, f"microbatch/{i}/gather/layers/", "forward", "_start")
        assert min(begun) > max(positions(lowered, f"microbatch/{i - 1}/layers/4/", "forward"))
        assert max(begun) < max(positions(lowered, f"microbatch/{i}/layers/", "forward"))
