"""Pipelines: every schedule on every mesh against one device; memory and size of each stage."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from pipelines import equals_one_device, traced

from llama_fn import tree
from llama_fn.compiler import ir, stages
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.model import arrays, random, train_step
from sharding import Mesh
from sharding.stages import Pipeline

MESHES = ("pipe:2", "pipe:4", "pipe:2,data:2", "pipe:2,model:2", "pipe:2,data:2,model:2")
ORDERS = (Pipeline("gpipe"), Pipeline("1f1b"), Pipeline("interleaved"), Pipeline("interleaved", 2), Pipeline("zb_h1"))
GRID = [
    (mesh, pipeline, layers, microbatches, dtype, kv_heads, remat, tied)
    for i, (mesh, pipeline, layers, microbatches) in enumerate(itertools.product(MESHES, ORDERS, (4, 8), (1, 4, 8)))
    # Each of these with every second of the choices below, so that any two of them meet.
    for j, (dtype, kv_heads, remat, tied) in enumerate(
        itertools.product(("fp64", "fp32"), (4, 2), ("none", "full"), (False, True))
    )
    if (i * 5 + j) % 8 == 0
    and layers >= int(mesh[5]) * pipeline.chunks
    and (pipeline.schedule != "interleaved" or microbatches % int(mesh[5]) == 0)
]


def sampled(case):
    """One of 111 of the grid."""
    return GRID.index(case) % 111 == 37


@pytest.mark.parametrize("case", filter(sampled, GRID), ids=str)
def test_a_pipeline_equals_one_device(case, random_inputs):
    equals_one_device(random_inputs, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", itertools.filterfalse(sampled, GRID), ids=str)
def test_every_pipeline_equals_one_device(case, random_inputs):
    equals_one_device(random_inputs, *case)


@pytest.mark.parametrize(
    "mesh, rules",
    [
        ("node:2,pipe:2,model:2", "fsdp_tp"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("pipe:2,data:2", "dp"),
                ("pipe:2,data:2", "zero1"),
                ("pipe:2,data:2", "fsdp"),
                ("pipe:2,model:2", "tp_sp"),
                ("pipe:2,data:2,context:2,model:2", "fsdp_tp_ulysses"),
            )
        ),
    ],
)
def test_every_preset_of_rules_goes_with_a_pipeline(mesh, rules, random_inputs):
    equals_one_device(random_inputs, mesh, Pipeline(), 4, 4, "fp64", 4, "none", False, rules=rules)


@pytest.mark.parametrize("held", [(3, 1), (1, 3)])
def test_stages_may_hold_different_numbers_of_layers(held, random_inputs):
    equals_one_device(random_inputs, "pipe:2,data:2", Pipeline("1f1b", 1, held), 4, 4, "fp64", 2, "none", True)


@pytest.mark.slow
def test_weights_are_gathered_for_each_piece_of_work(random_inputs, monkeypatch):
    """Where ZeRO-3 inside of a stage is to keep none of them whole."""
    monkeypatch.setitem(vars(sys.modules["llama_fn.compiler.passes.regather"]), "SMALL", 0)
    case = ("pipe:2,data:2", Pipeline("interleaved", 2), 8, 4, "fp64", 2, "full", False)
    equals_one_device(random_inputs, *case, rules="fsdp", gathers=True)
    _, step = traced(8, 4)
    remat = Remat("full", gathers=True)
    lowered = step.lower(Mesh.parse("pipe:2,data:2"), "fsdp", ("bucket",), remat=remat, pipeline=case[1])
    gathers = [row for row in lowered.collectives() if row.kind == "all_gather" and "layers" in row.scope]
    assert {row.phase for row in gathers} == {"forward", "backward"}
    # Four layers of this stage, four microbatches, there and back.
    assert {row.count for row in gathers if "wq" in row.scope} == {16}


@pytest.mark.slow
def test_gradients_are_reduced_for_each_piece_of_work(random_inputs, monkeypatch):
    monkeypatch.setitem(vars(sys.modules["llama_fn.compiler.passes.regather"]), "SMALL", 0)
    case = ("pipe:2,data:2", Pipeline("zb_h1"), 4, 4, "fp64", 2, "full", True)
    equals_one_device(random_inputs, *case, rules="fsdp", often=True)
    _, step = traced(4, 4, often=True)
    lowered = step.lower(Mesh.parse("pipe:2,data:2"), "fsdp", ("bucket",), pipeline=case[1])
    rows = {(row.kind, row.phase): row.count for row in lowered.collectives() if row.scope.endswith("layers/*/wq")}
    # Two layers of this stage, four microbatches; of what a forward gathered nothing is kept for its backward.
    assert rows == {("all_gather", "forward"): 8, ("all_gather", "backward"): 8, ("reduce_scatter", "backward"): 8}


@pytest.mark.parametrize("schedule", [pytest.param("gpipe", marks=pytest.mark.slow), "1f1b", "zb_h1"])
def test_an_evaluation_is_a_pipeline_of_forwards(schedule, random_inputs, fresh_state):
    cfg, _ = traced()
    params = fresh_state(cfg).params
    step = stages.jit(train_step.make_eval_step(cfg)).trace(
        train_step.abstract_state(cfg).params, train_step.abstract_batch(cfg)
    )
    batch = random_inputs(cfg)[0]
    piped = step.lower(Mesh.parse("pipe:4"), pipeline=Pipeline(schedule)).compile("interpret")(params, batch)
    torch.testing.assert_close(piped, step.lower().compile("interpret")(params, batch), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_stage_has_its_own_layers_and_little_more_per_microbatch():
    sizes = {}
    for microbatches in (8, 24):
        _, step = traced(4, microbatches)
        lowered = step.lower(Mesh.parse("pipe:4,model:2"))
        assert [one.title[-7:] for one in lowered.by_stage] == [f"stage {i}" for i in range(4)]
        for stage, one in enumerate(lowered.by_stage):
            nodes = [node for gm in ir.subgraphs(one.graph_module) for node in gm.graph.nodes]
            assert {ir.place_of(node).layer for node in nodes} - {None} == {stage}
            sizes[microbatches, stage] = len(one.graph_module.graph.nodes)
    assert all(sizes[24, stage] - sizes[8, stage] <= 20 * 16 for stage in range(4)), sizes


@pytest.mark.parametrize(
    "mesh, pipeline, remat",
    [
        ("pipe:4", Pipeline("gpipe"), "none"),
        ("pipe:4", Pipeline("1f1b"), "full"),
        ("pipe:2,model:2", Pipeline("interleaved", 2), "none"),
        ("pipe:4,data:2", Pipeline("zb_h1"), "none"),
    ],
)
def test_the_memory_of_each_stage_is_what_the_interpreter_measures(mesh, pipeline, remat, random_inputs):
    cfg, step = traced(8, 8, "fp32")
    lowered = step.lower(Mesh.parse(mesh), pipeline=pipeline, remat=remat)
    compiled = lowered.compile("interpret")
    compiled(arrays.materialize(train_step.abstract_state(cfg), random.key(0)), *random_inputs(cfg))
    for one in lowered.by_stage:
        predicted, measured = one.memory_analysis(), replace(compiled, lowered=one).memory_analysis()
        assert predicted.peak_bytes == measured.peak_bytes and predicted.temporary_bytes == measured.temporary_bytes


@pytest.mark.slow
def test_a_checkpoint_of_the_state_has_the_layers_in_the_order_of_the_model(random_inputs, fresh_state):
    """The interpreter's state is global: after a step with chunks it goes on without a pipeline."""
    cfg, step = traced(8, 4)
    state, alone = fresh_state(cfg), fresh_state(cfg)
    orders = (("pipe:2", Pipeline("interleaved", 2)), ("pipe:4", Pipeline("1f1b")), ("data:2", Pipeline()))
    for i, (mesh, pipeline) in enumerate(orders):
        state, _ = step.lower(Mesh.parse(mesh), pipeline=pipeline).compile("interpret")(state, *random_inputs(cfg, i))
        alone, _ = step.lower().compile("interpret")(alone, *random_inputs(cfg, i))
    for a, b in zip(tree.leaves(state), tree.leaves(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_losses_are_scaled_and_refused_as_on_one_device(random_inputs, fresh_state):
    """In fp16 a loss scale that overflows is halved on every stage at once."""
    cfg, _ = traced()
    cfg = replace(
        cfg,
        model=replace(cfg.model, compute_dtype="fp16"),
        optim=replace(cfg.optim, initial_loss_scale=2.0**40),
    )
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    traced_step = step.trace(*train_step.abstract_arguments(cfg))
    for mesh in ("", "pipe:4"):
        lowered = traced_step.lower(Mesh.parse(mesh)).compile("interpret")
        state = fresh_state(cfg)
        before = [x.clone() for x in tree.leaves(state.params)]
        state, metrics = lowered(state, *random_inputs(cfg))
        assert metrics["skipped_iterations"] == 1 and state.opt_state.guard.loss_scale == 2.0**32
        assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(state.params), strict=True))
