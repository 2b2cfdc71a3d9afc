"""The budget of GE graphs: from small models against whole ones, its limits, and the form that it chooses."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llama_fn.ascend import budget
from llama_fn.ascend.budget import Budget, GraphCounts
from llama_fn.compiler import calls, ir
from llama_fn.compiler.backends import ge_choice, ge_counts, npu_forms
from llama_fn.config import Config, DataConfig, MeshConfig, ModelConfig
from llama_fn.errors import UserError
from llama_fn.hardware import TABLE
from llama_fn.planner import config_stages, ge_budget, page, plan, report
from sharding import collectives_table

NPU = TABLE["ascend_910b1"]


def config(layers=7, microbatches=8, **mesh):
    model = ModelConfig(num_layers=layers, embed_dim=64, num_heads=4, mlp_dim=96, vocab_size=128, compute_dtype="bf16")
    data = DataConfig(seq_len=32, global_batch_size=microbatches * 2, microbatches=microbatches)
    return Config(model=model, data=data, mesh=MeshConfig(**mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg",
    [
        config(6, 6, axes="data:2,model:2", rules="fsdp_tp"),
        pytest.param(config(8, axes="pipe:2,model:2", rules="tp_sp", schedule="1f1b"), marks=pytest.mark.slow),
        pytest.param(config(12, 4, axes="data:2", rules="fsdp", remat="full", regather=True), marks=pytest.mark.slow),
        pytest.param(config(12, axes="pipe:2", schedule="interleaved", chunks=2), marks=pytest.mark.slow),
    ],
    ids=lambda cfg: f"{cfg.mesh.axes} {cfg.mesh.schedule}",
)
def test_a_budget_from_small_models_is_that_of_the_whole_one(cfg):
    mesh = config_stages.mesh(cfg)
    lowered = config_stages.lower(config_stages.train(cfg), cfg, mesh)
    for found, stage in zip(ge_budget._stages(cfg, mesh), lowered.by_stage, strict=True):
        whole = ge_counts.counted(stage.graph_module)
        assert found.each == whole.each
        assert found.between == whole.between


@pytest.mark.slow
def test_pieces_do_not_grow_with_the_microbatches():
    few, many = (
        ge_budget._stages(config(2, count, axes="pipe:2,model:2", rules="tp_sp"), config_stages.mesh(
            config(2, count, axes="pipe:2,model:2")))[1] for count in (8, 256)
    )  # fmt: skip
    assert few.in_form("calls").total == many.in_form("calls").total
    assert many.in_form("whole").total > 25 * few.in_form("calls").total


def test_streams_are_those_of_tasks():
    graph = GraphCounts("step", 1, Counter(MatMul=4000, HcomAllGather=30, HcomAllReduce=10), Counter(data=30, model=10))
    assert graph.tasks(3) == {"": 4000 + 2 * 40, "data": 30 * 5, "model": 10 * 5}
    assert graph.streams(3) == {"": 3, "data": 1, "model": 1}  # 4000 ops and 80 events
    assert graph.streams(245) == {"": 3, "data": 4, "model": 2}  # 30 x 247 and 10 x 247 tasks
    assert Budget("whole", (graph, graph)).streams("HOST") == 18


def test_a_limit_that_is_passed_is_an_error_that_says_what_takes_most(monkeypatch):
    graph = GraphCounts("", 1, Counter(HcomAllGather=20_000, MatMul=5_000), Counter(data=20_000))
    budget.refuse(Budget("whole", (graph,)), "", [])
    monkeypatch.setattr(budget, "STREAMS", 50)
    with pytest.raises(UserError, match=r"at least 73 streams .* has 50, .* 2,4\d\d with 245\. They have 25,000 ops"):
        budget.refuse(Budget("whole", (graph,)), "", [])


@pytest.mark.slow
def test_and_what_would_need_fewer_with_the_numbers(monkeypatch):
    cfg = config(2, 10, axes="data:2,model:2", rules="fsdp_tp")
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    monkeypatch.setattr(budget, "STREAMS", 1)
    with pytest.raises(UserError) as error:
        npu_forms.chosen(SimpleNamespace(graphs=lowered.graphs), "whole")
    said = str(error.value)
    assert re.search(r"are \d+ all_gather over (data|model) in microbatch/\*/layers/\*.*, made by partition", said), (
        said
    )
    calls, half = (int(n) for n in re.findall(r"(?:calls|size): (\d+) to \d+ streams", said))
    assert calls == ge_counts.counted(lowered.graph_module).in_form("calls").streams("AIV")
    small = replace(cfg, data=replace(cfg.data, microbatches=5, global_batch_size=10))
    fewer = config_stages.lower(config_stages.train(small), small, config_stages.mesh(small))
    assert half == pytest.approx(ge_counts.counted(fewer.graph_module).in_form("whole").streams("AIV"), abs=1)


def test_what_bucketing_is_worth_is_what_the_pass_makes_of_it():
    made = {}
    for without in ("", "bucket"):
        cfg = config(2, 1, axes="data:2,model:2", rules="fsdp_tp", without=without)
        lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
        made[without] = ge_counts.counted(lowered.graph_module)
    many = made["bucket"]
    assert many.bucketed().in_form("whole").collectives == made[""].in_form("whole").collectives
    assert many.in_form("whole").collectives > 1.3 * made[""].in_form("whole").collectives
    said = ge_choice.remedies(many, many.in_form("whole"))
    assert any(line.startswith("bucket, the pass that joins small collectives") for line in said)
    assert not any("bucket" in line for line in ge_choice.remedies(made[""], made[""].in_form("whole")))


@pytest.mark.parametrize(
    ("mesh", "passes"),
    [
        ({"axes": "data:2", "rules": "fsdp"}, {"partition", "bucket"}),
        (
            {"axes": "data:2", "rules": "fsdp", "remat": "full", "regather": True, "without": "bucket"},
            {"partition", "regather"},
        ),
        ({"axes": "model:2", "rules": "tp_sp", "remat": "full"}, {"partition", "bucket", "remat"}),
        ({"axes": "pipe:2"}, {"partition", "bucket", "pipeline"}),
    ],
)
def test_every_collective_says_which_pass_made_it(mesh, passes, monkeypatch):
    monkeypatch.setattr(sys.modules["llama_fn.compiler.passes.regather"], "SMALL", 0)
    cfg = config(4, 4, **mesh)
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    nodes = [node for gm in lowered.graphs for node, _ in calls.counted(gm) if collectives_table.row_of(node)]
    assert {ir.made_by(node) for node in nodes} == passes


def test_graphs_that_may_not_load_get_advice_and_a_plan_repeats_it(monkeypatch):
    cfg = config(2, 1, axes="data:2", rules="fsdp")
    mesh = config_stages.mesh(cfg)
    assert ge_budget.make(cfg, mesh, NPU)[1].count("\n") == 0
    monkeypatch.setattr(budget, "STREAMS", 2)
    made, why = ge_budget.make(cfg, mesh, NPU)
    assert (made.streams("AIV"), made.streams("HOST")) == (2, 3)
    assert "with 245 tasks for a collective they need 3 streams of a device, which has 2" in why
    assert (
        f"HCCL_OP_EXPANSION_MODE=AIV, where every group is inside of one machine: {made.streams('AIV')} streams" in why
    )
    assert re.search(r"twice as many stages .* some 1 to 2 streams", why)
    monkeypatch.setattr(budget, "GRAPH_BYTES", 1000)
    assert "are too large: one takes some" in ge_budget.make(cfg, mesh, NPU)[1]


def test_ops_that_join_more_tensors_than_one_can_are_several():
    """80 layers' gradients: a Pack of 63, one of 17, and a ConcatD of both (CANN's public pack_fusion_pass)."""
    graph = GraphCounts("", 1, Counter(Pack=3, Unpack=1), wide=(63, 64, 80, 256))
    assert graph.added == 0 + 2 + 2 + 5
    cfg = config(70, 1)
    (found,) = ge_budget._stages(cfg, config_stages.mesh(cfg))
    assert found.each[0].wide.count(70) == 18  # 9 stacked weights in 16 bits taken apart, 9 gradients put together
    assert found.in_form("whole").graphs[0].added == 18 * 2


def test_what_depends_on_no_input_is_told_in_bytes():
    cfg = config(2, 1)
    (piece,) = ge_counts.counted(config_stages.train(cfg).lower().graph_module).each
    angles, mask = 2 * 32 * 16 * 4, 2048 * 2048  # cos and sin of 32 tokens in fp32; what FlashAttention masks by
    assert piece.computed == angles + mask
    assert piece.constant_bytes == piece.computed + budget.CONST_BYTES_PER_OP * piece.total


def test_the_form_follows_from_the_budget(monkeypatch):
    cfg = config(2, 6, axes="data:2", rules="fsdp")
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    pieces = ge_counts.counted(lowered.graph_module)
    made, why = ge_choice.choose(pieces, "auto")
    assert made.form == "whole" and "written out, the step has" in why
    assert ge_choice.choose(pieces, "calls")[0].form == "calls"
    monkeypatch.setattr(ge_choice, "LONG_S", 1)
    made, why = ge_choice.choose(pieces, "auto")
    assert made.form == "calls" and "in pieces" in why
    monkeypatch.undo()
    monkeypatch.setattr(budget, "STREAMS", 1)
    assert ge_choice.choose(pieces, "auto")[0].form == "calls"


@pytest.mark.slow
def test_a_plan_has_it_in_text_and_json():
    cfg = config(2, 1, axes="data:2", rules="fsdp")
    mesh = config_stages.mesh(cfg)
    made, ge = plan.make(cfg, mesh, NPU), ge_budget.make(cfg, mesh, NPU)
    text, numbers = report.as_text(made, ge), json.loads(json.dumps(report.as_json(made, ge)))
    assert "GE graphs of a device, form whole:" in text and "of 2024 streams" in text
    assert numbers["ge"]["form"] == "whole" and numbers["ge"]["graphs"][0]["ops"]["FlashAttentionScore"] == 2
    assert numbers["ge"]["graphs"][0]["engines"]["HCCL"] == numbers["ge"]["graphs"][0]["events"] // 2 > 0
    (graph,) = numbers["ge"]["graphs"]
    assert graph["tasks"]["HOST"]["data"] == 247 * graph["collectives"]["data"] and graph["notifies"] == 2
    assert "<h2>GE graphs</h2><pre>GE graphs of a device, form whole" in page.page(made, ge)
    assert ge_budget.make(cfg, mesh, TABLE["h100"]) is None and report.as_json(made)["ge"] is None


def test_an_operator_without_an_entry_counts_as_itself():
    cfg = replace(config(2, 1), mesh=MeshConfig())
    gm = config_stages.train(cfg).lower().graph_module
    assert not {kind for piece in ge_counts.counted(gm).each for kind in piece.ops if "." in kind}
