"""--run.profile_steps: a whole trace of exactly the iterations asked for, its ranges our scopes on every backend, and a
table that gives every scope the time that was spent in it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kernels.scope_names import without_numbers
from llama_fn import config_checks, tree
from llama_fn.compiler import calls, cost, ir, ranges
from llama_fn.hardware import TABLE
from llama_fn.inspect import profile_table
from llama_fn.inspect.profiling import Profiler
from llama_fn.planner import config_stages, plan
from sharding import Mesh

HARDWARE = TABLE["a100"]


@pytest.fixture
def tiny_run(tiny_config, tmp_path):
    def make(steps="2:3"):
        cfg = tiny_config(num_layers=3)
        run = replace(cfg.run, profile_steps=steps, workdir=str(tmp_path))
        return config_checks.resolved(replace(cfg, run=run))

    return make


@pytest.fixture
def profile(fresh_state, random_inputs):
    """Runs a step under its profiler: the events of the trace, the text of the table, and the last state."""

    def go(cfg, step, steps, rank=0):
        profiler, state = Profiler(cfg, rank, step, HARDWARE), fresh_state(cfg)
        for i in range(1, steps + 1):
            profiler.before(i)
            with torch.profiler.record_function(f"step {i}"):
                state, metrics = step(state, *random_inputs(cfg, i))
            profiler.after(i)
        profiler.close()
        if not profiler.table.exists():
            return [], "", state
        return json.loads(profiler.target.read_text())["traceEvents"], profiler.table.read_text(), [state, metrics]

    return go


def check_nesting(events):
    """A range that ends after one that it began in is left out by Perfetto, and the trace is called damaged."""
    threads = defaultdict(list)
    for e in events:
        if e.get("ph") == "X":
            threads[e["pid"], e["tid"]].append((e["ts"], -e["dur"], e["name"]))
    for ranges_of in threads.values():
        around = []
        for begin, minus, name in sorted(ranges_of):
            while around and around[-1] <= begin:
                around.pop()
            assert not around or begin - minus <= around[-1], name
            around.append(begin - minus)


def steps_in(events):
    return {name for e in events if re.fullmatch(r"step \d+", name := e.get("name", ""))}


def test_the_trace_holds_the_steps_asked_for(tiny_run, profile, tmp_path):
    cfg = tiny_run("2:3")
    events, table, _ = profile(cfg, config_stages.train(cfg).lower().compile("eager"), 5)
    assert steps_in(events) == {"step 2", "step 3"}
    assert HARDWARE.name in table
    assert (tmp_path / "profile" / "rank_0_steps_2_3.json").exists()


def test_a_run_that_ends_early_keeps_what_it_has(tiny_run, profile, tmp_path):
    cfg = tiny_run("2:9")
    events, _, _ = profile(cfg, config_stages.train(cfg).lower().compile("eager"), 3, rank=1)
    assert steps_in(events) == {"step 2", "step 3"}
    assert (tmp_path / "profile" / "rank_1_steps_2_9.json").exists()


def test_nothing_is_written_unless_asked_for(tiny_run, profile, tmp_path):
    cfg = tiny_run("")
    assert profile(cfg, config_stages.train(cfg).lower().compile("eager"), 3)[0] == []
    assert not (tmp_path / "profile").exists()


def working_scopes(lowered):
    """Scopes that hold matrix products, which no compiler does away with or puts elsewhere."""
    products = [n for n in ir.calls(lowered.graph_module.graph) if cost.flops_of(n)]
    return {(without_numbers(ir.scope_of(n)), ir.phase_of(n)) for n in products}


@pytest.mark.parametrize(
    "microbatches", [pytest.param(1, marks=pytest.mark.slow), 6]
)  # six: those in the middle are calls
@pytest.mark.parametrize(
    ("backend", "mesh"), [pytest.param("eager", "", marks=pytest.mark.slow), ("interpret", "data:2,model:2")]
)
def test_ranges_carry_scopes_node_by_node(backend, mesh, microbatches, tiny_run, profile, with_data):
    cfg = with_data(tiny_run(), microbatches=microbatches, global_batch_size=4 * microbatches)
    lowered = config_stages.train(cfg).lower(Mesh.parse(mesh), "fsdp_tp")
    events, _, _ = profile(cfg, lowered.compile(backend), 3)
    check_nesting(events)
    nodes = [node for node, _ in calls.counted(lowered.graph_module)]
    assert set(profile_table.of_trace(events, 2)) == {(without_numbers(ir.scope_of(n)), ir.phase_of(n)) for n in nodes}


@pytest.mark.slow
def test_ranges_carry_scopes_in_compiled_code_and_leave_the_numbers(tiny_run, profile, tmp_path):
    cfg = tiny_run()
    lowered = config_stages.train(cfg).lower()
    plain = lowered.compile("inductor", cache=tmp_path)
    named = [lowered.compile("inductor", cache=tmp_path, profiled=True) for _ in range(2)]
    assert "_ranges" not in plain.executable.code
    assert [step.from_cache for step in named] == [False, True], "code with ranges is kept apart from code without"
    untitled, _, expected = profile(cfg, plain, 3)
    assert not [e for e in untitled if ranges.shares_of(e.get("name", ""))]
    for step in named:
        events, _, after = profile(cfg, step, 3)
        check_nesting(events)
        layers = sorted(
            (e["ts"], e["dur"], e["name"]) for e in events if "layers/" in e["name"] and "*" not in e["name"]
        )
        step_of_layers = [f"layers/{i} < microbatch/0 (forward)" for i in range(3)]
        step_of_layers += [f"layers/{i} < microbatch/0 (backward)" for i in reversed(range(3))]
        assert [name for *_, name in layers] == 2 * step_of_layers
        assert all(ts + us <= after for (ts, us, _), (after, *_) in pairwise(layers)), "one after the other"
        assert set(profile_table.of_trace(events, 2)) >= working_scopes(lowered)
        pairs = zip(tree.leaves(after), tree.leaves(expected), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_what_an_op_of_several_results_takes_is_its_own(tiny_run, tmp_path):
    """Head, loss and gradients are one op, whose operand a kernel makes in the scope of the final norm."""
    code = config_stages.train(tiny_run()).lower().compile("inductor", cache=tmp_path, profiled=True).executable.code
    before = code[: code.index("= torch.ops.llama_fn.head_loss")]
    assert re.findall(r"_ranges\.to\('(.*?)'\)", before)[-1] == "head < microbatch/* (backward)"


@pytest.mark.slow
def test_scopes_that_differ_are_not_taken_from_the_cache(tiny_run, tmp_path):
    lowered = config_stages.train(tiny_run()).lower()
    lowered.compile("inductor", cache=tmp_path, profiled=True)
    for node in ir.calls(lowered.graph_module.graph):
        where = dict(node.meta["custom"])
        node.meta["custom"] = where | {"scope": where["scope"].replace("mlp", "feed_forward")}
    renamed = lowered.compile("inductor", cache=tmp_path, profiled=True)
    assert "'feed_forward < layers/*" in renamed.executable.code
    assert "'mlp < layers/*" not in renamed.executable.code


def event(name, ts, dur, cat="user_annotation", tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


A, B, C = "a (forward)", "b (backward)", "layers/3 (forward)"
NESTED = [event(C, 0, 100), event(A, 10, 30), event(f"{A} 75%, {B} 25%", 50, 40), event("step 1", 0, 500)]


def test_a_range_counts_without_those_inside_and_is_shared_as_it_says():
    found = profile_table.of_trace(NESTED, steps=2)
    us = {key: round(seconds * 2e6, 6) for key, seconds in found.items()}
    assert us == {("layers/*", "forward"): 30, ("a", "forward"): 60, ("b", "backward"): 10}


def test_a_range_begins_with_what_tells_it_from_others():
    scope = "microbatch/0/layers/3/attention/rope"
    assert ranges.title(scope, "backward") == "rope < attention < layers/3 < microbatch/0 (backward)"
    assert ranges.shares_of(ranges.title(scope, "backward")) == {
        ("microbatch/*/layers/*/attention/rope", "backward"): 1.0
    }
    assert ranges.shares_of("ProfilerStep#3") == {}


def test_a_timeline_keeps_ranges_without_torchs_profiler():
    timeline, mine = ranges.Timeline(), ranges.Ranges()
    timeline.start()
    mine.timer, mine.on = ranges.RANGES.timer, True
    timeline.stop()
    mine.enter(C)
    mine.to(A)
    mine.to(A)
    mine.to(B)
    mine.leave()
    assert [e["name"] for e in timeline.events] == [A, B, C], "as they ended"
    (a, b, c), found = timeline.events, profile_table.of_trace(timeline.events, steps=1)
    assert c["ts"] <= a["ts"] and a["ts"] + a["dur"] <= b["ts"] and b["ts"] + b["dur"] <= c["ts"] + c["dur"]
    assert sum(found.values()) == pytest.approx(c["dur"] / 1e6)
    assert ranges.RANGES.timer is torch.profiler.record_function


def test_kernels_of_a_gpu_count_for_the_range_that_launched_them():
    launches = [event("cudaLaunchKernel", ts, 1, "cuda_runtime", tid, correlation=i)
                for i, (ts, tid) in enumerate([(5, 1), (15, 1), (45, 1), (55, 1), (200, 1), (15, 2)])]  # fmt: skip
    kernels = [event("k", 1000 + i, 100, "kernel", 7, correlation=i) for i in range(6)]
    found = profile_table.of_trace([*NESTED, *launches, *kernels], steps=1)
    us = {key: round(seconds * 1e6, 6) for key, seconds in found.items()}
    assert us == {
        ("layers/*", "forward"): 200, ("a", "forward"): 175, ("b", "backward"): 25, profile_table.ELSEWHERE: 200,
    }  # fmt: skip


def test_kernels_of_an_npu_count_by_the_names_of_ge_ops(tmp_path):
    folder = tmp_path / "host_1_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    folder.mkdir(parents=True)
    lines = [
        "Name,Type,Accelerator Core,Start Time(us),Duration(us)",
        "MatMul_1,MatMulV2,AI_CORE,1700.5,20",
        "MatMul_2,MatMulV2,AI_CORE,1730.5,10",
        "Add_fused,Add,AI_VECTOR_CORE,1750,7",
        "Mul,Mul,AI_VECTOR_CORE,1760,5",
    ]
    (folder / "kernel_details.csv").write_text("\n".join(lines) + "\n")
    kernels = profile_table.kernel_details(tmp_path, {"MatMul_1": A, "MatMul_2": A, "Mul": B})
    us = {key: round(seconds * 1e6, 6) for key, seconds in profile_table.of_kernels(kernels, steps=1).items()}
    assert us == {("a", "forward"): 30, ("b", "backward"): 5, profile_table.ELSEWHERE: 7}
    trace = profile_table.as_trace(kernels)["traceEvents"]
    assert [(e["name"], e["ts"], e["dur"]) for e in trace] == [(A, 1700.5, 40), (B, 1760, 5)]


def test_the_table_sets_every_scope_beside_its_prediction(tiny_run):
    lowered = config_stages.train(tiny_run()).lower()
    places = plan.scope_costs(lowered, HARDWARE)
    found = profile_table.rows({("new", "forward"): 1.0}, lowered, HARDWARE)
    assert (found[0].scope, found[0].measured_ms, found[0].predicted_ms) == ("new", 1000.0, 0.0)
    assert sum(r.predicted_ms for r in found) == pytest.approx(sum(1e3 * max(p.math_s, p.memory_s) for p in places))
    assert {(r.scope, r.phase) for r in found[1:]} == {(p.scope, p.phase) for p in places if p.memory_s}
    text = profile_table.as_text(found, HARDWARE)
    assert "1000.000      0.000" in text and text.splitlines()[-2].endswith("all")
