"""The stages: what is traced is what runs, on every backend; labels, donation, guards and errors."""

from __future__ import annotations

import gc
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels as k
from llama_fn import tree
from llama_fn.compat import cpp_units
from llama_fn.compiler import ir, stages
from llama_fn.errors import UserError
from llama_fn.model import train_step
from sharding import Mesh


def traced_step(cfg):
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    return step.trace(*train_step.abstract_arguments(cfg))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("backend", ["eager", "interpret"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_traced_equals_eager_bitwise(backend, dtype, tiny_config, random_inputs, fresh_state, with_data):
    cfg = with_data(tiny_config(compute_dtype=dtype), microbatches=2)
    compiled = traced_step(cfg).lower().compile(backend)
    step = train_step.make_train_step(cfg)
    state, want = fresh_state(cfg), fresh_state(cfg)
    for i in range(3):
        state, metrics = compiled(state, *random_inputs(cfg, i))
        want, want_metrics = step(want, *random_inputs(cfg, i))
        assert equal((state, metrics), (want, want_metrics))


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_inductor_equals_eager_to_round_off(dtype, tiny_config, random_inputs, fresh_state, tmp_path):
    cfg = tiny_config(compute_dtype=dtype, num_layers=3)
    lowered = traced_step(cfg).lower()
    eager, fast = lowered.compile("eager"), lowered.compile("inductor", cache=tmp_path)
    a, b = fresh_state(cfg), fresh_state(cfg)
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    for i in range(2):
        a, want = eager(a, *random_inputs(cfg, i))
        b, got = fast(b, *random_inputs(cfg, i))
        for name in want:
            assert got[name].item() == pytest.approx(want[name].item(), rel=tolerance), name
    again = lowered.compile("inductor", cache=tmp_path)
    assert not fast.from_cache and again.from_cache
    (first,), (second,) = fast.executable.origins, again.executable.origins
    assert first.key == second.key and first.file == second.file and first.file.read_text() == again.executable.code
    os.utime(first.file, (time.time() - 7200,) * 2)
    assert str(second) == f"code {first.key[:12]}, compiled 2 h ago, {first.file}"
    c = fresh_state(cfg)
    for i in range(2):
        c, _ = again(c, *random_inputs(cfg, i))
    assert equal(c, b)


def test_donated_state_lives_in_the_old_buffers(tiny_config, random_inputs, fresh_state):
    cfg = tiny_config()
    state = fresh_state(cfg)
    new, _ = traced_step(cfg).lower().compile("interpret")(state, *random_inputs(cfg))
    pointers = [x.data_ptr() for x in tree.leaves(state)]
    assert [x.data_ptr() for x in tree.leaves(new)] == pointers
    assert new.step.item() == 1


@pytest.mark.parametrize("backend", ["eager", "interpret"])
def test_the_loss_scale_reported_is_the_one_used(backend, tiny_config, random_inputs, fresh_state):
    """It is an input that the step overwrites: a result that shared its buffer would show the next step's."""
    cfg = tiny_config(compute_dtype="fp16")
    cfg = replace(cfg, optim=replace(cfg.optim, loss_scale_window=1, initial_loss_scale=256.0))
    step, state = traced_step(cfg).lower().compile(backend), fresh_state(cfg)
    seen = []
    for i in range(3):
        state, metrics = step(state, *random_inputs(cfg, i))
        seen.append(metrics["loss_scale"])
    assert [x.item() for x in seen] == [256.0, 512.0, 1024.0]


def test_a_donated_swap_does_not_read_overwritten_values():
    def swap(state, x):
        return {"a": state["b"], "b": state["a"]}, state["a"] + x

    args = ({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, torch.tensor(3.0))
    state, out = stages.jit(swap, donate=0).trace(*args).lower().compile("eager")(*args)
    assert (state["a"].item(), state["b"].item(), out.item()) == (2.0, 1.0, 4.0)


def test_every_node_has_scope_and_phase_and_placeholders_have_paths(tiny_config):
    graph = traced_step(tiny_config()).graph_module.graph
    for node in ir.calls(graph):
        assert ir.scope_of(node) and ir.phase_of(node) in ir.PHASES, node
    phases = [ir.phase_of(node) for node in ir.calls(graph)]
    assert phases == sorted(phases, key=ir.PHASES.index), "phases follow one another"
    backward = [n for n in ir.calls(graph) if ir.phase_of(n) == "backward" and "/layers/1/" in ir.scope_of(n)]
    assert any("attention_bwd" in str(n.target) for n in backward)
    assert ir.placeholders(graph)[1].meta["path"] == "state.params.embed"


def test_text_of_a_rung_names_shapes_scopes_and_sources(tiny_config):
    text = traced_step(tiny_config()).as_text()
    assert "llama_fn.attention.default" in text and "layers/0/attention llama.py:" in text
    assert "f32[2,32,4,8]" in text and "return %" in text


def test_an_op_outside_of_scopes_has_its_own_line():
    def step(x):
        y = k.einsum("bd,df->bf", x, x)
        return y * 2

    text, first = stages.jit(step).trace(torch.ones(2, 2)).as_text(), step.__code__.co_firstlineno
    assert f"step test_stages.py:{first + 1}" in text and f"step test_stages.py:{first + 2}" in text, text


def test_costs_are_those_counted_by_hand(tiny_config):
    cfg = tiny_config()
    lowered = traced_step(cfg).lower()
    m, tokens, t = cfg.model, 4 * 16, 16
    matrices = m.num_layers * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48) + 64 * 32
    forward = 2 * matrices * tokens + m.num_layers * 2 * t * 32 * tokens
    flops = lowered.cost_analysis().flops
    head = 2 * 64 * 32 * tokens  # which goes forward and backward in one op, a block at a time
    assert flops["forward"] == forward - head
    assert flops["backward"] == 4 * matrices * tokens + head + m.num_layers * 5 * t * 32 * tokens
    assert flops["optimizer"] == 0


def test_predicted_peak_memory_is_what_the_interpreter_measures(tiny_config, random_inputs, fresh_state):
    cfg = replace(tiny_config(vocab_size=512, embed_dim=64), data=replace(tiny_config().data, seq_len=64))
    lowered = traced_step(cfg).lower()
    compiled = lowered.compile("interpret")
    compiled(fresh_state(cfg), *random_inputs(cfg))
    measured, predicted = compiled.memory_analysis(), lowered.memory_analysis()
    assert predicted.temporary_bytes == pytest.approx(measured.temporary_bytes, rel=0.05)
    assert predicted.argument_bytes == measured.argument_bytes


def test_repeated_layers_are_outlined_and_compute_the_same(tiny_config, random_inputs, fresh_state, with_data):
    from llama_fn.compiler import passes
    from llama_fn.compiler.passes.outline import outline

    cfg = with_data(tiny_config(num_layers=4), microbatches=2)
    lowered = traced_step(cfg).lower()
    outlined = outline(passes.copy_graph(lowered.graph_module), None)
    calls = [n for n in ir.calls(outlined.graph) if "invoke_subgraph" in str(n.target)]
    assert len(calls) == 2 * 2 * 4 and len(list(outlined.children())) == 2
    inputs = lambda: [*tree.leaves(fresh_state(cfg)), *tree.leaves(random_inputs(cfg))]  # noqa: E731
    a, b = inputs(), inputs()
    with torch.no_grad():
        want, got = lowered.graph_module(*a), outlined(*b)
    assert equal((want, a), (got, b))


def test_a_compiled_step_names_every_leaf_that_differs(tiny_config, random_inputs, fresh_state):
    cfg = tiny_config()
    compiled = traced_step(cfg).lower().compile("eager")
    batch = random_inputs(cfg)[0]
    wrong = train_step.Batch(batch.tokens[..., :-1], batch.targets.int(), batch.loss_mask)
    with pytest.raises(ValueError) as error:
        compiled(fresh_state(cfg), wrong)
    assert "batch.tokens: expected i64[1,4,16], given i64[1,4,15]" in str(error.value)
    assert "batch.targets: expected i64[1,4,16], given i32[1,4,16]" in str(error.value)
    assert "loss_mask" not in str(error.value)


def test_a_step_is_traced_once(tiny_config):
    cfg = tiny_config()
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    args = train_step.abstract_arguments(cfg)
    step.trace(*args)
    assert step.trace_count == 1
    with pytest.raises(ValueError, match="already traced"):
        step.trace(*args)


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_waits_for_a_trace(fails):
    found = []

    def step(x):
        found.append(gc.isenabled())
        return [x + 1][1 if fails else 0]

    with pytest.raises(IndexError) if fails else nullcontext():
        stages.jit(step).trace(torch.zeros(2))
    assert found == [False] and gc.isenabled()


def test_jit_called_directly_climbs_the_ladder(tiny_config):
    double = stages.jit(lambda x: {"y": x["a"] * 2}, backend="eager")
    assert double({"a": torch.ones(2)})["y"].tolist() == [2.0, 2.0]
    assert double({"a": torch.ones(2) * 3})["y"].tolist() == [6.0, 6.0] and double.trace_count == 1


def test_constants_baked_into_a_trace_are_refused():
    hidden = torch.ones(3)
    with pytest.raises(ValueError, match="not among its arguments"):
        stages.jit(lambda x: x + hidden).trace(torch.zeros(3))


def test_donation_of_another_tree_is_refused():
    with pytest.raises(ValueError, match=r"x\.b: .*out\[0\]\.b, must be f32\[2\] and is nothing"):
        stages.jit(lambda x: ({"a": x["a"]}, x["b"]), donate=0).trace({"a": torch.ones(1), "b": torch.ones(2)})


def test_unknown_backends_and_larger_meshes_are_refused(tiny_config):
    traced = traced_step(tiny_config())
    with pytest.raises(UserError, match="Did you mean inductor"):
        traced.lower().compile("inducter")
    with pytest.raises(UserError, match="torchrun --nproc_per_node=2"):
        traced.lower(Mesh.parse("data:2")).compile("eager")


def double(x):
    return torch.sin(x) * 2


def test_code_compiled_by_another_version_of_ours_is_not_found(tmp_path, monkeypatch):
    from llama_fn.compat import inductor

    def compiled():
        return stages.jit(double).trace(torch.ones(41)).lower().compile("inductor", cache=tmp_path / "cache")

    assert not compiled().from_cache and compiled().from_cache
    changed = shutil.copytree(Path(inductor.__file__).parent, tmp_path / "compat") / "inductor_ranges.py"
    changed.write_text(changed.read_text() + "# another way to write code\n")
    monkeypatch.setattr(inductor, "__file__", str(changed.with_name("inductor.py")))
    assert not compiled().from_cache and compiled().from_cache


def test_damaged_compiled_code_costs_a_compilation_only(tmp_path):
    def compiled():
        return stages.jit(double).trace(torch.ones(40)).lower().compile("inductor", cache=tmp_path)

    assert not compiled().from_cache and compiled().from_cache
    kept = [p for p in tmp_path.rglob("*") if p.is_file() and "fxgraph" in p.parts]
    assert kept
    for path in kept:
        path.write_bytes(b"no pickle")
    again = compiled()
    assert not again.from_cache and torch.allclose(again(torch.ones(40)), double(torch.ones(40)))


def test_kernels_share_translation_units():
    sources = ["a" * n for n in (5, 1, 4, 2)]
    assert sorted(i for group in cpp_units.group(sources, 2) for i in group) == [0, 1, 2, 3]
    assert [sum(len(sources[i]) for i in group) for group in cpp_units.group(sources, 2)] == [6, 6]
    assert cpp_units.group(sources, 64) == [[0], [2], [3], [1]]
