"""The planner: FLOPs and bytes by hand, links by mesh, the interpreter's memory, and a tool with an exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_fn.compiler import calls
from llama_fn.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig
from llama_fn.hardware import TABLE, Reserved
from llama_fn.model.presets import preset
from llama_fn.planner import plan, report, streams
from sharding import Mesh
from sharding.collectives import all_gather_start

ROOT = Path(__file__).resolve().parents[2]
NPU = replace(TABLE["ascend_910b1"], reserved=Reserved())
CFG = Config(model=ModelConfig(num_layers=2), data=DataConfig(seq_len=64, global_batch_size=4, microbatches=2))


def test_flops_are_those_of_the_products_and_the_causal_half_of_attention():
    m, d = CFG.model, CFG.data
    found = plan.make(CFG, Mesh(), NPU)
    tokens = d.global_batch_size * d.seq_len
    layer = 4 * m.embed_dim**2 + 3 * m.embed_dim * m.mlp_dim
    products = 6 * tokens * (m.num_layers * layer + m.vocab_size * m.embed_dim)
    # Two products of 2 T S H per head forward and five backward, over the causal half.
    attention = (2 + 5) * d.global_batch_size * m.num_heads * m.head_dim * d.seq_len**2 * m.num_layers
    assert found.hardware_flops == products + attention
    assert found.model_flops == products + 6 * tokens * m.embed_dim * d.seq_len * m.num_layers


def test_bytes_at_rest_are_divided_by_the_shards():
    one, four = plan.make(CFG, Mesh(), NPU), plan.make(CFG, Mesh.parse("data:2,model:2"), NPU)
    assert one.parameters_bytes == 4 * one.parameters and one.gradients_bytes == 4 * one.parameters
    assert one.optimizer_bytes == 8 * one.parameters + 6 * 4, "two moments, two counts, four numbers of the guard"
    norms = (2 * CFG.model.num_layers + 1) * CFG.model.embed_dim * 4
    assert four.parameters_bytes == (one.parameters_bytes - norms) // 4 + norms // 2, "norms are whole over model"
    assert not one.transfers and one.comms_s == 0 and four.comms_s > 0


@pytest.mark.parametrize(
    ("mesh", "axes", "inside"),
    [
        ("data:12,model:8", "model", True), ("data:12,model:8", "data", False), ("data:8", "data", True),
        ("data:16", "data", False), ("data:12,model:8", "data+model", False), ("model:4", "model", True),
    ],
)  # fmt: skip
def test_an_axis_takes_the_link_that_its_devices_share(mesh, axes, inside):
    wanted = NPU.link_bytes_per_s if inside else NPU.network_bytes_per_s
    assert plan.bandwidth(axes, Mesh.parse(mesh), NPU) == wanted


def by_axis(made):
    """Seconds of sending over each axis."""
    totals = defaultdict(float)
    for transfer in made.transfers:
        totals[transfer.row.axis] += transfer.seconds
    return totals


def test_times_follow_from_the_hardware():
    mesh = Mesh.parse("data:2,model:2")
    slow = replace(NPU, link_bytes_per_s=NPU.link_bytes_per_s / 10)
    a, b = plan.make(CFG, mesh, NPU), plan.make(CFG, mesh, slow)
    assert b.comms_s == pytest.approx(10 * a.comms_s) and b.compute_s == pytest.approx(a.compute_s)
    for each in (a, b):
        assert each.step_time_alone_s == each.compute_s + each.comms_s
        at_least = max([each.compute_s, *by_axis(each).values()])
        assert at_least <= each.step_time_s <= each.one_stream_s <= each.step_time_alone_s * (1 + 1e-9)
    assert a.comms_s == pytest.approx(sum(t.row.bytes * t.row.count for t in a.transfers) / NPU.link_bytes_per_s)
    assert a.mfu == pytest.approx(a.model_flops / a.step_time_s / NPU.peak_flops_per_s)
    assert sum(p.flops for p in a.scopes) == a.hardware_flops


@pytest.mark.parametrize(
    ("name", "microbatches"),
    [("llama_tiny", 1), ("llama_tiny", 2), pytest.param("llama_60m", 2, marks=pytest.mark.slow)],
)
def test_the_peak_is_what_the_interpreter_measures(name, microbatches, random_inputs, fresh_state):
    from llama_fn.compiler import stages
    from llama_fn.model import train_step

    cfg = replace(CFG, model=preset(name), data=replace(CFG.data, microbatches=microbatches))
    found = plan.make(cfg, Mesh(), NPU)
    traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg))
    step = traced.lower().compile("interpret")
    step(fresh_state(cfg), *random_inputs(cfg))
    assert found.peak_bytes == pytest.approx(step.memory_analysis().peak_bytes, rel=0.05)
    assert max(moment.bytes for moment in found.timeline) == found.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "rules", "microbatches", "often", "more"),
    [
        ("data:2", "fsdp", 1, False, {"remat": "full", "regather": True}),
        pytest.param("data:2,model:2", "fsdp_tp", 4, True, {"remat": "full", "regather": True}, marks=pytest.mark.slow),
        pytest.param("data:2", "fsdp", 4, False, {}, marks=pytest.mark.slow),
        pytest.param("data:4", "zero1", 4, False, {"remat": "dots"}, marks=pytest.mark.slow),
    ],
)
def test_a_deep_model_is_planned_from_shallow_ones_exactly(mesh, rules, microbatches, often, more):
    """Against the whole graph of 11 layers: its liveness, its FLOPs, its table of collectives."""
    from llama_fn.planner import config_stages

    model = ModelConfig(num_layers=11, embed_dim=512, num_heads=4, num_kv_heads=4, mlp_dim=1024, vocab_size=64)
    cfg = Config(
        model=replace(model, compute_dtype="bf16"),
        data=DataConfig(seq_len=64, global_batch_size=4 * microbatches, microbatches=microbatches),
        optim=OptimConfig(reduce_per_microbatch=often), mesh=MeshConfig(axes=mesh, rules=rules, **more),
    )  # fmt: skip
    found = plan.make(cfg, Mesh.parse(mesh), NPU)
    lowered = config_stages.lower(config_stages.train(cfg), cfg, Mesh.parse(mesh))
    memory = lowered.memory_analysis()
    assert found.peak_bytes == memory.peak_bytes and max(m.bytes for m in found.timeline) == memory.peak_bytes
    assert found.hardware_flops == lowered.cost_analysis().total_flops
    assert sorted(t.row for t in found.transfers) == sorted(lowered.collectives())
    whole = streams.spent([node for node, _ in calls.counted(lowered.graph_module)], lowered.mesh, NPU)
    assert found.step_time_s == pytest.approx(whole.elapsed_s, rel=0.01)
    assert found.one_stream_s == pytest.approx(whole.one_stream_s, rel=0.01)


@pytest.mark.slow
def test_every_number_of_a_survey_grows_by_the_same_from_layer_to_layer():
    """What lives at each op included, in three microbatches. With fewer layers told apart at the ends it does not."""
    from llama_fn.planner import config_stages
    from llama_fn.planner.survey import ENDS, extrapolated, survey

    mesh = Mesh.parse("data:2,model:2")

    def of(layers):
        model = ModelConfig(num_layers=layers, embed_dim=512, num_heads=4, mlp_dim=768, vocab_size=64)
        cfg = Config(
            model=replace(model, compute_dtype="bf16"),
            data=DataConfig(seq_len=16, global_batch_size=12, microbatches=3),
            mesh=MeshConfig(axes=str(mesh), remat="dots", regather=True),
            optim=OptimConfig(reduce_per_microbatch=True),
        )  # fmt: skip
        return survey(config_stages.lower(config_stages.train(cfg), cfg, mesh), NPU, 3)

    found, whole = extrapolated(of(2 * ENDS), of(2 * ENDS + 1), 2), of(2 * ENDS + 2)
    assert found == pytest.approx({key: whole[key] for key in found}, rel=1e-12)


@pytest.mark.slow
def test_flops_are_those_that_torch_counts():
    """FlopCounterMode over the step in plain operators. It counts attention's whole square, where ours is causal."""
    from torch.utils.flop_counter import FlopCounterMode

    from llama_fn import tree
    from llama_fn.compiler import passes
    from llama_fn.compiler.backends import forms
    from llama_fn.compiler.passes.expand import expand
    from llama_fn.model import arrays, random, train_step
    from llama_fn.planner import config_stages

    m, d = CFG.model, CFG.data
    ids = torch.randint(0, m.vocab_size, (d.microbatches, d.global_batch_size // d.microbatches, d.seq_len))
    state = arrays.materialize(train_step.abstract_state(CFG), random.key(0))
    plain = expand(passes.copy_graph(config_stages.train(CFG).lower().graph_module), {}, forms.finder({}), {})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(*tree.leaves((
            state, train_step.Batch(ids, ids, torch.ones(ids.shape)), train_step.hyperparameters(CFG)
        )))  # fmt: skip
    half = 7 * d.global_batch_size * m.num_heads * m.head_dim * d.seq_len**2 * m.num_layers
    assert counter.get_total_flops() == plan.make(CFG, Mesh(), NPU).hardware_flops + half


@pytest.mark.slow
def test_a_sharded_fused_head_costs_one_product_of_logits_more():
    fused = replace(CFG, model=replace(CFG.model, fused_head=True))
    whole, halved = (plan.make(fused, mesh, NPU) for mesh in (Mesh(), Mesh.parse("model:2")))
    tokens = CFG.data.global_batch_size * CFG.data.seq_len
    again = 2 * tokens * CFG.model.embed_dim * CFG.model.vocab_size  # logits, once more where they are sharded
    assert whole.hardware_flops + again == 2 * halved.hardware_flops


def run(*flags):
    command = [sys.executable, "-m", "llama_fn.tools.plan", "--data.seq_len=64", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_tool_prints_writes_and_judges(tmp_path):
    file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    done = run("--mesh.axes=data:2,model:2", f"--json={file}", f"--page={page}")
    assert page.read_text().count("<img") == 3 and "http" not in page.read_text().replace("http://www.w3.org", "")
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout and "total over model" in done.stdout and "bound" in done.stdout
    found = json.loads(file.read_text())
    keys = (
        "parameters", "parameters_bytes", "optimizer_bytes", "gradients_bytes", "activations_bytes", "peak_bytes",
        "model_flops", "hardware_flops", "step_time_s", "tokens_per_second_per_device", "mfu",
    )  # fmt: skip
    assert all(isinstance(found[key], (int, float)) for key in keys)
    assert {"kind", "axis", "dtype", "bytes", "count", "phase", "scope"} <= set(found["collectives"][0])
    bigger = run("--model.preset=llama_7b", "--hardware=a100")
    assert bigger.returncode == 1 and "DOES NOT FIT" in bigger.stdout


@pytest.mark.slow
def test_and_refuses_meshes_that_do_not_divide():
    wrong = run("--mesh.axes=model:3", "--mesh.rules=tp_sp")
    assert wrong.returncode == 2 and "do not divide" in wrong.stderr


def test_what_the_runtime_takes_is_not_the_steps():
    """A device that holds the step's peak and nothing more does not fit once the runtime and each communicator take
    their part: data, model, both together for the norm, and the world."""
    found = plan.make(CFG, Mesh.parse("data:2,model:2"), NPU)
    assert {t.row.axis for t in found.transfers} == {"data", "model", "data+model"}
    reserved = Reserved(1000, 10)
    exact, short = (
        replace(found, hardware=replace(NPU, hbm_bytes=found.peak_bytes + 1040 - less, reserved=reserved))
        for less in (0, 1)
    )
    assert exact.reserved_bytes == 1040 and exact.spare_bytes == 0 and exact.fits
    assert not short.fits and "GB are missing" in report.as_text(short)
    assert "fits with" in report.as_text(replace(found, hardware=TABLE["ascend_910b1"]))
    assert all(h.reserved.runtime_bytes > 0 and h.reserved.communicator_bytes > 0 for h in TABLE.values())


MESH_2 = Mesh.parse("data:2,model:2")


def begun_at_once(*ops):
    """Gathers over (axes, milliseconds), none of which is waited for."""
    graph = torch.fx.Graph()
    for i, (axes, ms) in enumerate(ops):
        x = graph.placeholder(f"x{i}")
        size = round(ms * 1e-3 * plan.bandwidth(axes, MESH_2, NPU))
        x.meta["val"] = torch.empty(size, dtype=torch.uint8, device="meta")
        graph.call_function(all_gather_start.op, (x, axes, 2, 0)).meta["val"] = torch.empty(0)
    return [node for node in graph.nodes if node.op == "call_function"]


def test_collectives_of_different_axes_overlap_and_those_of_one_axis_do_not():
    of = lambda *ops: streams.spent(begun_at_once(*ops), MESH_2, NPU)  # noqa: E731
    apart = of(("data", 3), ("model", 2))
    assert apart.elapsed_s == pytest.approx(3e-3) and apart.one_stream_s == pytest.approx(5e-3)
    together = of(("data", 3), ("data", 2))
    assert together.elapsed_s == together.one_stream_s == pytest.approx(5e-3) == together.comms_s
