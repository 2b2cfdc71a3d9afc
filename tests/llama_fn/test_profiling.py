"""--run.profile_steps leaves one whole trace of exactly the iterations asked for."""

from __future__ import annotations

import json

import torch

from llama_fn.profiling import Profiler


def run(profiler, steps):
    for i in range(1, steps + 1):
        profiler.before(i)
        with torch.profiler.record_function(f"step {i}"):
            torch.ones(4).sum()
        profiler.after(i)
    profiler.close()


def names(path):
    return {e["name"] for e in json.loads(path.read_text())["traceEvents"] if e.get("name", "").startswith("step ")}


def test_the_trace_holds_the_steps_asked_for(tmp_path):
    run(Profiler(range(2, 4), tmp_path, 0, "cpu"), 5)
    assert names(tmp_path / "profile" / "rank_0_steps_2_3.json") == {"step 2", "step 3"}


def test_a_run_that_ends_early_keeps_what_it_has(tmp_path):
    run(Profiler(range(2, 9), tmp_path, 1, "cpu"), 3)
    assert names(tmp_path / "profile" / "rank_1_steps_2_8.json") == {"step 2", "step 3"}


def test_nothing_is_written_unless_asked_for(tmp_path):
    run(Profiler(range(0), tmp_path, 0, "cpu"), 3)
    assert not (tmp_path / "profile").exists()
