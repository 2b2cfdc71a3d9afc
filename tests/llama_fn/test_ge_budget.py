"""The budget of GE graphs: from small models against whole ones, its limits, and the form that it chooses."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llama_fn.ascend import budget
from llama_fn.ascend.budget import Budget, GraphCounts
from llama_fn.compiler.backends import ge_counts, npu_forms
from llama_fn.config import Config, DataConfig, MeshConfig, ModelConfig
from llama_fn.errors import UserError
from llama_fn.hardware import TABLE
from llama_fn.planner import config_stages, ge_budget, page, plan, report

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
    assert re.search(r"are \d+ all_gather over (data|model) in microbatch/\*/layers/\*", said), said
    calls, half = (int(n) for n in re.findall(r"(?:calls|size): (\d+) to \d+ streams", said))
    assert calls == ge_counts.counted(lowered.graph_module).in_form("calls").streams("AIV")
    small = replace(cfg, data=replace(cfg.data, microbatches=5, global_batch_size=10))
    fewer = config_stages.lower(config_stages.train(small), small, config_stages.mesh(small))
    assert half == pytest.approx(ge_counts.counted(fewer.graph_module).in_form("whole").streams("AIV"), abs=1)


def test_the_form_follows_from_the_budget(monkeypatch):
    cfg = config(2, 6, axes="data:2", rules="fsdp")
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    pieces = ge_counts.counted(lowered.graph_module)
    made, why = ge_counts.choose(pieces, "auto")
    assert made.form == "whole" and "written out, the step has" in why
    assert ge_counts.choose(pieces, "calls")[0].form == "calls"
    monkeypatch.setattr(ge_counts, "LONG_S", 1)
    made, why = ge_counts.choose(pieces, "auto")
    assert made.form == "calls" and "in pieces" in why
    monkeypatch.undo()
    monkeypatch.setattr(budget, "STREAMS", 1)
    assert ge_counts.choose(pieces, "auto")[0].form == "calls"


@pytest.mark.slow
def test_a_plan_has_it_in_text_and_json():
    cfg = config(2, 1, axes="data:2", rules="fsdp")
    mesh = config_stages.mesh(cfg)
    made, ge = plan.make(cfg, mesh, NPU), ge_budget.make(cfg, mesh, NPU)
    text, numbers = report.as_text(made, ge), json.loads(json.dumps(report.as_json(made, ge)))
    assert "GE graphs of a device, form whole:" in text and "of 2024 streams" in text
    assert numbers["ge"]["form"] == "whole" and numbers["ge"]["graphs"][0]["ops"]["FlashAttentionScore"] == 2
    assert numbers["ge"]["graphs"][0]["engines"]["HCCL"] == numbers["ge"]["graphs"][0]["events"] // 2 > 0
    assert "<h2>GE graphs</h2><pre>GE graphs of a device, form whole" in page.page(made, ge)
    assert ge_budget.make(cfg, mesh, TABLE["h100"]) is None and report.as_json(made)["ge"] is None


def test_an_operator_without_an_entry_counts_as_itself():
    cfg = replace(config(2, 1), mesh=MeshConfig())
    gm = config_stages.train(cfg).lower().graph_module
    assert not {kind for piece in ge_counts.counted(gm).each for kind in piece.ops if "." in kind}
