"""The plan of a pipeline, made from two small models, against the programs of the whole one and published formulas."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from llama_fn.compiler import calls, ir
from llama_fn.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from llama_fn.errors import UserError
from llama_fn.hardware import named
from llama_fn.planner import config_stages, page, piped, plan, report, trace
from llama_fn.planner.streams import spent
from sharding.schedules import FORWARD, Work

HARDWARE = named("ascend_910b1", "bf16")


def config(layers=8, microbatches=8, often=False, **mesh):
    return Config(
        model=ModelConfig(
            num_layers=layers, embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=96, vocab_size=128,
            compute_dtype="bf16",
        ),
        data=DataConfig(seq_len=32, global_batch_size=microbatches * 2, microbatches=microbatches),
        optim=OptimConfig(reduce_per_microbatch=often), mesh=MeshConfig(**mesh),
    )  # fmt: skip


CONFIGS = [
    config(axes="pipe:2,model:2", schedule="1f1b", remat="full"),
    pytest.param(config(axes="pipe:2,data:2", schedule="zb_h1", rules="fsdp"), marks=pytest.mark.slow),
    *(
        pytest.param(cfg, marks=pytest.mark.slow)
        for cfg in (
            config(axes="pipe:2", schedule="gpipe"),
            config(16, axes="pipe:2,model:2", schedule="interleaved", chunks=2),
            config(12, axes="pipe:2", schedule="1f1b", stage_layers="7,5"),
            config(axes="pipe:2,data:2", often=True, remat="dots"),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: f"{cfg.mesh.axes} {cfg.mesh.schedule}")
def test_a_plan_of_a_few_layers_is_that_of_all(cfg):
    mesh = config_stages.mesh(cfg)
    made = plan.make(cfg, mesh, HARDWARE)
    lowered = config_stages.lower(config_stages.train(cfg), cfg, mesh)
    whole = [one.memory_analysis() for one in lowered.by_stage]
    assert made.peak_bytes == pytest.approx(max(memory.peak_bytes for memory in whole), rel=0.01)
    for stage, memory in zip(made.pipeline.stages, whole, strict=True):
        assert stage.temporary_bytes == pytest.approx(memory.temporary_bytes, rel=0.02)
    assert made.pipeline.timeline.step_s == pytest.approx(from_whole_programs(cfg, lowered), rel=0.01)
    slowest = lowered.by_stage[made.pipeline.slowest]
    assert made.hardware_flops == pytest.approx(slowest.cost_analysis().total_flops, rel=1e-9)
    assert sum(t.row.count for t in made.transfers) == sum(row.count for row in slowest.collectives())


def from_whole_programs(cfg, lowered):
    """Seconds of the microbatches, by the bodies that the run itself would call."""
    held, order = piped.work(cfg, lowered.mesh)
    bodies = {}
    for stage, one in enumerate(lowered.by_stage):
        for node in filter(calls.is_call, ir.calls(one.graph_module.graph)):
            nodes = calls.body_of(one.graph_module, node).graph.nodes
            bodies.setdefault((stage, node.args[0].target), spent(nodes, lowered.mesh, HARDWARE).elapsed_s)

    def takes(stage, work: Work):
        return bodies.get((stage, f"{work.kind.replace(' ', '_')}_{work.chunk * held.count + stage}"), 0.0)

    message_s = plan.make(cfg, lowered.mesh, HARDWARE).pipeline.message_s
    return piped.simulate(order, takes, message_s).step_s


def test_a_plan_says_what_each_stage_does():
    cfg = config(axes="pipe:2", schedule="1f1b", remat="full")
    made = plan.make(cfg, config_stages.mesh(cfg), HARDWARE)
    text, numbers = report.as_text(made), json.loads(json.dumps(report.as_json(made)))
    assert re.search(r"pipeline: 1f1b, bubble 0\.\d+, the slowest stage [\d.]+% above the mean", text)
    assert numbers["pipeline"]["schedule"] == "1f1b" and [s["layers"] for s in numbers["pipeline"]["stages"]] == [4, 4]
    line = made.pipeline.timeline
    assert numbers["step_time_s"] == pytest.approx(made.pipeline.before_s + line.step_s + made.pipeline.after_s)
    # The first stage begins at once, the second when the first microbatch reaches it.
    assert line.stages[0][0].begin_s == 0 and line.stages[1][0].work == Work(FORWARD, 0)
    assert line.stages[1][0].begin_s == pytest.approx(line.stages[0][0].end_s + made.pipeline.message_s)


@pytest.mark.slow
def test_a_page_and_a_trace_show_the_schedule():
    cfg = config(16, 8, axes="pipe:2", schedule="interleaved", chunks=2)
    made = plan.make(cfg, config_stages.mesh(cfg), HARDWARE)
    text = page.page(made)
    assert "Stages over the step" in text and "alt='whole'" in text and "alt='beginning'" in text
    events = trace.trace(made.pipeline)["traceEvents"]
    spans = [e for e in events if e["ph"] == "X" and e["tid"] == trace.WORK]
    assert len([e for e in spans if e["name"].startswith("forward")]) == 2 * 2 * 8
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(made.step_time_s * 1e6)
    # Of four parts three hand each of eight microbatches on, and its gradient back, always to the other stage.
    sent, received = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert sent.keys() == received.keys() and len(sent) == 2 * 3 * 8
    assert all(received[i]["ts"] > sent[i]["ts"] and received[i]["pid"] != sent[i]["pid"] for i in sent)


def test_what_cannot_be_planned_is_told():
    cfg = config(axes="pipe:2", remat="budget", remat_gb=1.0)
    with pytest.raises(UserError, match=r"remat=budget keeps other values in some layers"):
        plan.make(cfg, config_stages.mesh(cfg), HARDWARE)
    with pytest.raises(
        UserError, match=r"--mesh.chunks=2 deals layers out .* and --mesh.axes=data:2 has none: add pipe:N"
    ):
        config_stages.pipeline(config(axes="data:2", chunks=2))
    cfg = replace(cfg, mesh=replace(cfg.mesh, axes="pipe:3", remat="none", remat_gb=0.0))
    with pytest.raises(UserError, match=r"8 layers do not divide by 3 stages"):
        plan.make(cfg, config_stages.mesh(cfg), HARDWARE)
