"""A step for CUDA without a GPU: one CUDA graph of the device's own operators, every kernel compiled to machine code,
and what the code computes when it is interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h100
import pytest
import torch
from fetched import Unavailable

from llama_fn.compiler.backends import forms
from llama_fn.errors import UserError

FLASH = "aten._scaled_dot_product_flash_attention.default"
BACKWARD = "aten._scaled_dot_product_flash_attention_backward.default"
EMBEDDING = "llama_fn.embedding_bwd.default"


@pytest.fixture
def work(tmp_path):
    """Runs a worker of this folder in a process of its own, and gives what it found."""
    try:
        environment = h100.environment(tmp_path)
    except Unavailable as reason:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{reason}; runs on Linux where g++ and the triton wheel can be had")

    def go(worker, job):
        out = tmp_path / "found.json"
        command = [sys.executable, str(Path(__file__).with_name(worker)), json.dumps(job), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert not done.returncode, done.stderr[-4000:]
        return json.loads(out.read_text())

    return go


def check(found, attention, written=30):
    """One CUDA graph, which writes only where its inputs stay, whose own are a batch and a scalar, whose results are
    copied out of it before the next run, and nothing of which is the CPU's."""
    (graph,) = found["graphs"]
    assert graph["written"] >= written and graph["elsewhere"] == 0 and graph["copied"] <= 4
    assert found["not_graphed"] == 0 and found["overwritten_results"] == 0
    assert found["devices"] == ["cuda"] and found["kernels"] > 10
    assert set(found["operators"]) == {"mm", *attention}


@pytest.mark.slow
def test_a_step_in_bf16_is_one_cuda_graph_with_flash_attention(work):
    check(work("compile_worker.py", {"dtype": "bf16", "microbatches": 1}), {FLASH, BACKWARD, EMBEDDING})


def test_the_validation_step_reads_the_weights_where_they_are(work):
    check(work("compile_worker.py", {"dtype": "bf16", "microbatches": 1, "evaluation": True}), {FLASH}, written=0)


@pytest.mark.slow
def test_a_step_in_fp16_with_microbatches_is_one_cuda_graph(work):
    check(work("compile_worker.py", {"dtype": "fp16", "microbatches": 3, "batch": 6}), {FLASH, BACKWARD, EMBEDDING})


@pytest.mark.slow
def test_a_step_in_fp32_is_one_cuda_graph_with_blocked_attention(work):
    check(work("compile_worker.py", {"dtype": "fp32", "microbatches": 1}), {"bmm", EMBEDDING})


@pytest.mark.slow
def test_the_benchmarks_llama_1b_is_one_cuda_graph(work):
    job = {"preset": "llama_1b", "dtype": "bf16", "microbatches": 1, "seq_len": 2048, "batch": 8}
    check(work("compile_worker.py", job), {FLASH, BACKWARD, EMBEDDING})


@pytest.mark.slow
def test_a_device_of_four_has_its_collectives_in_the_cuda_graph(work):
    found = work("compile_worker.py", {"dtype": "bf16", "microbatches": 2, "mesh": "data:2,model:2"})
    sent = {op for op in found["operators"] if op.startswith("_c10d_functional.")}
    assert {f"_c10d_functional.{op}.default" for op in ("all_gather_into_tensor", "reduce_scatter_tensor")} < sent
    check(found, {*sent, FLASH, BACKWARD, "llama_fn.embedding_part_bwd.default"})


@pytest.mark.parametrize(
    ("dtype", "microbatches", "steps", "tolerance"),
    [
        pytest.param("fp16", 2, 2, 5e-3, marks=pytest.mark.slow),
        pytest.param("fp32", 1, 1, 2e-6, marks=pytest.mark.slow),
    ],
    ids=["fp16", "fp32"],
)
def test_the_code_computes_what_the_eager_step_does_and_names_its_scopes(dtype, microbatches, steps, tolerance, work):
    found = work("run_worker.py", {"dtype": dtype, "microbatches": microbatches, "steps": steps})
    assert len(found["distances"]) > 30
    assert {path: d for path, d in found["distances"].items() if d > tolerance} == {}
    for name, (value, expected) in found["metrics"].items():
        assert value == pytest.approx(expected, rel=tolerance), name
    assert len(found["products"]) > 4
    assert [scope for scope in found["products"] if scope not in found["ranges"]] == []


def test_flash_attention_is_refused_where_cuda_has_none():
    with pytest.raises(UserError, match="FlashAttention on cuda takes bf16 and fp16"):
        forms.choose("cuda", torch.float32, "flash")
    assert forms.choose("cuda", torch.float32, "auto") == {"attention": "blocked"}
