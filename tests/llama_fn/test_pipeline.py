"""Pipelines: every schedule on every mesh against one device, what the cut refuses, and what the check finds."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from llama_fn import compat, tree
from llama_fn.compiler import ir, stages
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.compiler.pipeline.check import check
from llama_fn.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from llama_fn.errors import UserError
from llama_fn.model import arrays, random, train_step
from llama_fn.model.transforms import named_scope
from sharding import Mesh, P, constrain, schedules
from sharding.messages import MESSAGES, over_stages, receive, send
from sharding.stages import Pipeline, Stages

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
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


@cache
def traced(layers=4, microbatches=4, dtype="fp64", kv_heads=2, tied=False, often=False):
    cfg = Config(
        model=ModelConfig(
            num_layers=layers, embed_dim=32, num_heads=4, num_kv_heads=kv_heads, mlp_dim=48, vocab_size=64,
            compute_dtype=dtype, tie_embeddings=tied,
        ),
        data=DataConfig(seq_len=8, global_batch_size=2 * microbatches, microbatches=microbatches),
        optim=OptimConfig(reduce_per_microbatch=often), run=RunConfig(steps=10),
    )  # fmt: skip
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    return cfg, step.trace(train_step.abstract_state(cfg), train_step.abstract_batch(cfg))


def trained(lowered, cfg, random_batch, steps=3):
    """Metrics, and parameters and moments, after some steps."""
    step, rows = lowered.compile("interpret"), []
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
    for i in range(steps):
        state, metrics = step(state, random_batch(cfg, i))
        rows.append(torch.stack([metrics["lm_loss"], metrics["grad_norm"]]))
    return [torch.stack(rows), *tree.leaves(state)]


def on_one_device(traced_for, random_batch, known={}):  # noqa: B006 (a memo)
    if traced_for not in known:
        cfg, step = traced(*traced_for)
        known[traced_for] = trained(step.lower(), cfg, random_batch)
    return known[traced_for]


def equals_one_device(random_batch, mesh, pipeline, layers, microbatches, dtype, kv_heads, remat, tied, **more):
    traced_for = layers, microbatches, dtype, kv_heads, tied, more.pop("often", False)
    cfg, step = traced(*traced_for)
    remat = Remat(remat, gathers=more.pop("gathers", False))
    got = trained(step.lower(Mesh.parse(mesh), pipeline=pipeline, remat=remat, **more), cfg, random_batch)
    for a, b in zip(got, on_one_device(traced_for, random_batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype])


def sampled(case):
    """One of seven of the grid."""
    return GRID.index(case) % 7 == 0


@pytest.mark.parametrize("case", filter(sampled, GRID), ids=str)
def test_a_pipeline_equals_one_device(case, random_batch):
    equals_one_device(random_batch, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", itertools.filterfalse(sampled, GRID), ids=str)
def test_every_pipeline_equals_one_device(case, random_batch):
    equals_one_device(random_batch, *case)


@pytest.mark.parametrize(
    "mesh, rules",
    [
        ("pipe:2,data:2", "dp"),
        ("pipe:2,data:2", "zero1"),
        ("pipe:2,data:2", "fsdp"),
        ("pipe:2,model:2", "tp_sp"),
        ("node:2,pipe:2,model:2", "fsdp_tp"),
        ("pipe:2,data:2,context:2,model:2", "fsdp_tp_ulysses"),
    ],
)
def test_every_preset_of_rules_goes_with_a_pipeline(mesh, rules, random_batch):
    equals_one_device(random_batch, mesh, Pipeline(), 4, 4, "fp64", 4, "none", False, rules=rules)


@pytest.mark.parametrize("held", [(3, 1), (1, 3)])
def test_stages_may_hold_different_numbers_of_layers(held, random_batch):
    equals_one_device(random_batch, "pipe:2,data:2", Pipeline("1f1b", 1, held), 4, 4, "fp64", 2, "none", True)


def test_weights_are_gathered_for_each_piece_of_work(random_batch, monkeypatch):
    """Where ZeRO-3 inside of a stage is to keep none of them whole."""
    monkeypatch.setitem(vars(sys.modules["llama_fn.compiler.passes.regather"]), "SMALL", 0)
    case = ("pipe:2,data:2", Pipeline("interleaved", 2), 8, 4, "fp64", 2, "full", False)
    equals_one_device(random_batch, *case, rules="fsdp", gathers=True)
    _, step = traced(8, 4)
    remat = Remat("full", gathers=True)
    lowered = step.lower(Mesh.parse("pipe:2,data:2"), "fsdp", ("bucket",), remat=remat, pipeline=case[1])
    gathers = [row for row in lowered.collectives() if row.kind == "all_gather" and "layers" in row.scope]
    assert {row.phase for row in gathers} == {"forward", "backward"}
    # Four layers of this stage, four microbatches, there and back.
    assert {row.count for row in gathers if "wq" in row.scope} == {16}


def test_gradients_are_reduced_for_each_piece_of_work(random_batch, monkeypatch):
    monkeypatch.setitem(vars(sys.modules["llama_fn.compiler.passes.regather"]), "SMALL", 0)
    case = ("pipe:2,data:2", Pipeline("zb_h1"), 4, 4, "fp64", 2, "full", True)
    equals_one_device(random_batch, *case, rules="fsdp", often=True)
    _, step = traced(4, 4, often=True)
    lowered = step.lower(Mesh.parse("pipe:2,data:2"), "fsdp", ("bucket",), pipeline=case[1])
    rows = {(row.kind, row.phase): row.count for row in lowered.collectives() if row.scope.endswith("layers/*/wq")}
    # Two layers of this stage, four microbatches; of what a forward gathered nothing is kept for its backward.
    assert rows == {("all_gather", "forward"): 8, ("all_gather", "backward"): 8, ("reduce_scatter", "backward"): 8}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_h1"])
def test_an_evaluation_is_a_pipeline_of_forwards(schedule, random_batch, fresh_state):
    cfg, _ = traced()
    params = fresh_state(cfg).params
    step = stages.jit(train_step.make_eval_step(cfg)).trace(
        train_step.abstract_state(cfg).params, train_step.abstract_batch(cfg)
    )
    batch = random_batch(cfg)
    piped = step.lower(Mesh.parse("pipe:4"), pipeline=Pipeline(schedule)).compile("interpret")(params, batch)
    torch.testing.assert_close(piped, step.lower().compile("interpret")(params, batch), rtol=0, atol=1e-10)


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
def test_the_memory_of_each_stage_is_what_the_interpreter_measures(mesh, pipeline, remat, random_batch):
    cfg, step = traced(8, 8, "fp32")
    lowered = step.lower(Mesh.parse(mesh), pipeline=pipeline, remat=remat)
    compiled = lowered.compile("interpret")
    compiled(arrays.materialize(train_step.abstract_state(cfg), random.key(0)), random_batch(cfg))
    for one in lowered.by_stage:
        predicted, measured = one.memory_analysis(), replace(compiled, lowered=one).memory_analysis()
        assert predicted.peak_bytes == measured.peak_bytes and predicted.temporary_bytes == measured.temporary_bytes


def bad(step, mesh="pipe:2", pipeline=None):
    with pytest.raises(UserError) as error:
        step.lower(Mesh.parse(mesh), pipeline=pipeline)
    return str(error.value)


def test_what_cannot_be_a_pipeline_is_told():
    _, step = traced()
    assert "4 layers are fewer than 8 stages x 1 chunks" in bad(step, "pipe:8")
    assert "--mesh.chunks=3 does not divide 4 layers; it can be [1, 2]" in bad(
        step, pipeline=Pipeline("interleaved", 3)
    )
    assert "one chunk per stage, and 2 are asked for" in bad(step, pipeline=Pipeline("gpipe", 2))
    assert "--mesh.stage_layers=1,2 are 2 numbers whose sum is 3" in bad(step, pipeline=Pipeline("1f1b", 1, (1, 2)))
    assert "4 layers do not divide by 3 stages" in bad(step, "pipe:3")
    _, odd = traced(4, 1)
    assert "1 microbatches are not a multiple of 2 stages; use 2" in bad(odd, pipeline=Pipeline("interleaved", 2))
    flat = stages.jit(lambda x: constrain(x.sum(), P())).trace(arrays.ArrayInfo((4,), torch.float32, ("batch",)))
    assert "parameters stacked along a first logical axis layers" in bad(flat)


def test_a_function_without_microbatches_or_with_layers_apart_is_told():
    stacked = arrays.ArrayInfo((4, 8), torch.float32, ("layers", "embed"))
    whole = stages.jit(lambda w: constrain(w.sum(), P())).trace(stacked)
    assert "this function has none: compute its loss" in bad(whole)

    def mixed(w):
        with named_scope("microbatch/0"):
            first, *_, last = torch.ops.aten.unbind.int(w, 0)
            return constrain((first * last).sum(), P())

    assert "its operands stand on parts" in bad(stages.jit(mixed).trace(stacked))


def programs(edit=None):
    """The stages of a small pipeline, that of stage 1 edited."""
    _, step = traced(4, 4)
    graphs = step.lower(Mesh.parse("pipe:4"), pipeline=Pipeline("1f1b")).graphs
    if edit:
        edit(graphs[1].graph)
    return graphs


def nodes_of(graph, op):
    return [node for node in graph.nodes if node.target is op]


def with_another_tag(graph):
    node = nodes_of(graph, send.op)[2]
    node.args = (*node.args[:-1], 4711)


def with_another_shape(graph):
    node = nodes_of(graph, receive.op)[0]
    node.meta["val"] = compat.node_value(node).new_empty(3)


def in_another_order(graph):
    first, second, *_ = nodes_of(graph, send.op)
    first.args, second.args = (*first.args[:-1], second.args[-1]), (*second.args[:-1], first.args[-1])


def without_a_collective(graph):
    (node, *_) = [n for n in graph.nodes if "all_reduce" in str(n.target) and "pipe" in n.args]
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def waiting_before_sending(graph):
    """It waits for the gradient of what it has not yet sent on."""
    sent = [n for n in nodes_of(graph, send.op) if n.args[-2] == 1]
    first, *_ = [n for n in nodes_of(graph, MESSAGES[2]) if n.args[-2] == 1]
    for node in reversed(sent):
        first.append(node)


@pytest.mark.parametrize(
    "edit, message",
    [
        (with_another_tag, r"from stage 1 to \d: .*send.* has tag 4711, and stage \d asks nothing with that tag"),
        (with_another_shape, r"from stage 0 to 1, tag \d+: .* sends f64\[2,8,32\], and .* asks for f64\[3\]"),
        (in_another_order, r"from stage 1 to 2: .* sends what comes after .* has asked"),
        (without_a_collective, r"stage 0 comes to .* when stage 1 comes to"),
        (waiting_before_sending, r"would wait for ever: .*; stage 1 at .*; stage 2 at"),
    ],
)
def test_programs_that_do_not_go_together_are_found(edit, message):
    check(programs())
    with pytest.raises(UserError, match=message):
        check(programs(edit))


def test_a_checkpoint_of_the_state_has_the_layers_in_the_order_of_the_model(random_batch, fresh_state):
    """The interpreter's state is global: after a step with chunks it goes on without a pipeline."""
    cfg, step = traced(8, 4)
    state, alone = fresh_state(cfg), fresh_state(cfg)
    orders = (("pipe:2", Pipeline("interleaved", 2)), ("pipe:4", Pipeline("1f1b")), ("data:2", Pipeline()))
    for i, (mesh, pipeline) in enumerate(orders):
        state, _ = step.lower(Mesh.parse(mesh), pipeline=pipeline).compile("interpret")(state, random_batch(cfg, i))
        alone, _ = step.lower().compile("interpret")(alone, random_batch(cfg, i))
    for a, b in zip(tree.leaves(state), tree.leaves(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_losses_are_scaled_and_refused_as_on_one_device(random_batch, fresh_state):
    """In fp16 a loss scale that overflows is halved on every stage at once."""
    cfg, _ = traced()
    cfg = replace(
        cfg,
        model=replace(cfg.model, compute_dtype="fp16"),
        optim=replace(cfg.optim, initial_loss_scale=2.0**40),
    )
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    traced_step = step.trace(train_step.abstract_state(cfg), train_step.abstract_batch(cfg))
    for mesh in ("", "pipe:4"):
        lowered = traced_step.lower(Mesh.parse(mesh)).compile("interpret")
        state = fresh_state(cfg)
        before = [x.clone() for x in tree.leaves(state.params)]
        state, metrics = lowered(state, random_batch(cfg))
        assert metrics["skipped_iterations"] == 1 and state.opt_state.guard.loss_scale == 2.0**32
        assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(state.params), strict=True))


def swapped_entries(monkeypatch, _):
    """The first stage's first two forwards change places."""

    def order(*sizes):
        (first, second, *rest), *others = schedules.one_f_one_b(*sizes)
        return [[second, first, *rest], *others]

    monkeypatch.setitem(schedules.SCHEDULES, "1f1b", order)


def dropped_stash(monkeypatch, graphs):
    """A forward hands its backward another value in the place of one that it should keep."""
    (forward,) = [gm for gm, name in ir.subgraphs(graphs[0]).items() if name == "forward_0"]
    out = ir.output_node(forward.graph)
    kept = list(out.args[0])
    alike = [(i, j) for i, x in enumerate(kept) for j, y in enumerate(kept) if 0 < i < j and same_kind(x, y)]
    i, j = alike[0]
    kept[j] = kept[i]
    out.args = (kept,)


def same_kind(x, y):
    return arrays.describe(compat.node_value(x)) == arrays.describe(compat.node_value(y))


def norm_without_pipe(monkeypatch, graphs):
    """Each stage clips by the norm of its own gradients."""
    for gm in graphs:
        (node, *_) = [n for n in gm.graph.nodes if "optim.py" in compat.labels(n).get("source", "") and over_stages(n)]
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)


def permuted_layers(monkeypatch, _):
    """A stage takes the rows of its two chunks for one another's."""
    slot_of = Stages.slot_of
    monkeypatch.setattr(Stages, "slot_of", lambda self, layer: (slot_of(self, layer) + self.slots // 2) % self.slots)


@pytest.mark.parametrize(
    "fault, pipeline",
    [
        (swapped_entries, Pipeline("1f1b")),
        (dropped_stash, Pipeline("1f1b")),
        (norm_without_pipe, Pipeline("1f1b")),
        (permuted_layers, Pipeline("interleaved", 2)),
        (None, Pipeline("interleaved", 2)),
    ],
)
def test_a_fault_in_a_pipeline_is_seen(fault, pipeline, random_batch, monkeypatch):
    """Each by the check, by stages that disagree, or by numbers that are not those of one device."""
    cfg, step = traced(4, 4)
    want = on_one_device((4, 4, "fp64", 2, False, False), random_batch)

    def equal():
        if fault in (swapped_entries, permuted_layers):
            fault(monkeypatch, None)
        lowered = step.lower(Mesh.parse("pipe:2"), pipeline=pipeline)
        if fault in (dropped_stash, norm_without_pipe):
            fault(monkeypatch, lowered.graphs)
        return all(
            torch.allclose(a, b, rtol=0, atol=1e-10)
            for a, b in zip(trained(lowered, cfg, random_batch), want, strict=True)
        )

    try:
        seen = not equal()
    except (UserError, RuntimeError) as error:
        seen = re.search("sends what comes after|hold different values", str(error)) is not None
    assert seen == (fault is not None)
