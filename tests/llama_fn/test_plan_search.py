"""The search for meshes: what fits is found, and what is left out cannot fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llama_fn.config import Config, DataConfig, MeshConfig, ModelConfig
from llama_fn.hardware import TABLE, Reserved
from llama_fn.planner import plan
from sharding import Mesh

ROOT = Path(__file__).resolve().parents[2]
NPU = replace(TABLE["ascend_910b1"], reserved=Reserved())
CFG = Config(model=ModelConfig(num_layers=2), data=DataConfig(seq_len=64, global_batch_size=4, microbatches=2))


@pytest.mark.slow
def test_the_search_finds_what_fits_and_says_why_not_the_rest(monkeypatch):
    """On a device with room for the state of a device in four, but not for all of it."""
    from llama_fn.planner import search

    cfg = replace(CFG, data=replace(CFG.data, microbatches=1), model=replace(CFG.model, num_heads=2, num_kv_heads=2))
    whole = plan.make(cfg, Mesh(), NPU)
    small = replace(NPU, hbm_bytes=whole.parameters_bytes * 2)
    monkeypatch.setattr(search, "SEQUENCES", (1,))
    heard: list[str] = []
    tried = search.search(cfg, 4, small, heard.append)
    # One to four stages of four layers, then other schedules of a pipeline.
    assert heard[9].startswith("10 of 10 meshes and rules") and heard[-1].startswith("1 of 1 other schedules")
    assert any(t.plan and t.plan.pipeline for t in tried)
    best = tried[0]
    assert best.plan is not None and best.plan.peak_bytes <= small.hbm_bytes
    speeds = [t.plan.tokens_per_second_per_device for t in tried if t.plan]
    assert speeds == sorted(speeds, reverse=True)
    reasons = {t.cfg.mesh.axes + " " + t.cfg.mesh.rules: t.why for t in tried if t.plan is None}
    assert "the state alone takes" in reasons["data:4 dp"] and "model" in reasons["model:4 tp_sp"]
    text = search.as_text(tried)
    assert best.flags in text and "rejected" in text


@pytest.mark.slow
def test_the_search_leaves_out_only_what_cannot_fit(monkeypatch):
    """Against every option of every size planned, on devices with more and more room beside the state."""
    from llama_fn.planner import search

    model, traces = replace(CFG.model, num_layers=1), {}
    cfg = replace(CFG, model=model, data=replace(CFG.data, seq_len=512, global_batch_size=8, microbatches=1))
    family = next(f for f in search._families(cfg, 2) if f[0].mesh.rules == "zero1")
    options = {base.data.microbatches: list(search._options(base)) for base in family}
    planned = {o: plan.make(o, Mesh.parse("data:2"), NPU, traces) for each in options.values() for o in each}
    monkeypatch.setattr(search.plan, "make", lambda cfg, mesh, hardware, *_: replace(planned[cfg], hardware=hardware))
    outcomes = set()
    for limit in sorted({p.peak_bytes for p in planned.values()}):
        small = replace(NPU, hbm_bytes=limit)
        tried = {t.cfg.data.microbatches: t.plan for t in search._try(family, small)}
        for size, each in options.items():
            first = next((o for o in each if planned[o].peak_bytes <= limit), None)
            taken = tried.get(size)
            assert (taken and taken.cfg) == first
            outcomes.add(first and each.index(first))
    assert len(outcomes) > 3, "several options were the first to fit"


COUNTERS = 100  # bytes that the scalars of a state take at most


@pytest.mark.parametrize(
    "rules", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("dp", "zero1", "fsdp", "tp_sp")), "fsdp_tp"]
)
def test_what_the_search_rejects_untraced_is_too_much(rules):
    """On a device that just holds the planned peak nothing is rejected; on one with a byte less than the state and the
    float32 sum of the gradients, each is named."""
    from llama_fn.planner import search

    axes = {"tp_sp": "model:4", "fsdp_tp": "data:2,model:2"}.get(rules, "data:4")
    often = (False, True) if rules != "dp" else (False,)
    for each in often:
        cfg = replace(CFG, data=replace(CFG.data, global_batch_size=8), mesh=MeshConfig(axes=axes, rules=rules))
        cfg = replace(cfg, optim=replace(cfg.optim, reduce_per_microbatch=each))
        found = plan.make(cfg, Mesh.parse(axes), NPU)
        state = found.parameters_bytes + found.optimizer_bytes
        assert search._why_not(cfg, replace(NPU, hbm_bytes=found.peak_bytes)) == ""
        assert "the state alone takes" in search._why_not(cfg, replace(NPU, hbm_bytes=state * 0.99))
        # Tensor parallelism shards every matrix and no norm.
        norms = (2 * cfg.model.num_layers + 1) * cfg.model.embed_dim
        held = (found.parameters - norms) // dict(Mesh.parse(axes).axes).get("model", 1) + norms
        for limit, enough in ((state + 4 * held - 1, each), (state + 4 * held + COUNTERS, True)):
            why = search._why_not(cfg, replace(NPU, hbm_bytes=limit))
            assert ("sum of gradients alone take" in why) == (not enough)


def test_the_search_cuts_sequences_where_they_are_too_few():
    from llama_fn.planner import search

    cfg = replace(CFG, data=replace(CFG.data, global_batch_size=2, microbatches=1))
    meshes = [(f[0].mesh.axes, f[0].mesh.rules) for f in search._families(cfg, 4)]
    assert ("data:2,context:2", "fsdp_tp_ulysses") in meshes and ("data:2,model:2", "fsdp_tp") in meshes
    assert not [axes for axes, _ in meshes if "data:4" in axes]


@pytest.mark.slow
def test_activations_grow_with_the_layers_and_not_with_the_parameters():
    def saved(layers, mlp):
        model = replace(CFG.model, num_layers=layers, mlp_dim=mlp)
        return plan.make(replace(CFG, model=model), Mesh(), NPU).activations_bytes

    one, two, three = (saved(n, 688) for n in (1, 2, 3))
    assert two - one == three - two > 0
    tokens = CFG.data.global_batch_size * CFG.data.seq_len // CFG.data.microbatches
    assert saved(1, 1376) - one == tokens * 688 * 4 * 3, "gate, up and their product, float32"
