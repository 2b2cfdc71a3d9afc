"""Steps lowered through the real torchair, once per session, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import standin

TINY = {"model.preset": "llama_tiny"}
DTYPES = ("fp32", "bf16", "fp16")
SHAPES = ("llama_60m", "llama_1b", "llama_7b", "llama_13b", "llama_33b", "llama_65b", "llama2_70b", "llama3_8b")


def _job(mesh: str = "", ranks: int = 1, rules: str = "fsdp_tp", fuse: bool = False, **values) -> dict:
    named = {name.replace("__", "."): value for name, value in values.items()}
    return {"config": {**TINY, **named}, "mesh": mesh, "rules": rules, "ranks": list(range(ranks)), "fuse": fuse}


JOBS = {
    **{f"tiny_{d}": _job(model__compute_dtype=d) for d in DTYPES},
    **{f"tiny_{d}_data2_model4": _job("data:2,model:4", model__compute_dtype=d) for d in DTYPES},
    "tiny_2_ranks": _job("model:2", 2, data__seq_len=64),
    "tiny_4_ranks": _job("data:2,model:2", 4, data__seq_len=64),
    "tiny_ulysses": _job("context:2", 2, "fsdp_tp_ulysses", data__seq_len=64, model__num_layers=2),
    "tiny_fp16_gqa": _job(
        model__compute_dtype="fp16", model__num_kv_heads=2, model__num_layers=2, data__seq_len=16, data__microbatches=2
    ),
    "tiny_fused": _job(
        "model:2",
        2,
        "tp_sp",
        True,
        model__compute_dtype="bf16",
        model__num_layers=2,
        data__seq_len=64,
        data__global_batch_size=1,
    ),
    "65b_8layers": _job("data:1,model:8", model__preset="llama_65b_8layers", model__compute_dtype="bf16"),
    "65b_fused": _job(
        "data:8,model:4",
        fuse=True,
        model__preset="llama_65b_8layers",
        model__num_layers=2,
        model__compute_dtype="bf16",
        data__seq_len=512,
    ),
    **{
        # One sequence per device: what a batch of 8 over data:8 leaves.
        f"shape_{name}": _job(
            "data:8,model:4", model__preset=name, model__num_layers=2, model__compute_dtype="bf16", data__seq_len=512
        )
        for name in SHAPES
    },
}


@pytest.fixture(scope="session")
def torch_npu_environment():
    try:
        return standin.environment()
    except standin.Unavailable as reason:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def lowered(tmp_path_factory, torch_npu_environment):
    """Job name -> folder with a dump per rank."""
    folder = tmp_path_factory.mktemp("ge")
    jobs = [{**job, "out": str(folder / name)} for name, job in JOBS.items()]
    _work(jobs, torch_npu_environment, folder)
    return {name: folder / name for name in JOBS}


def _work(jobs, environment, folder: Path) -> None:
    """Two processes, as conversion is single-threaded."""
    running = []
    for i in range(2):
        file = folder / f"jobs_{i}.json"
        file.write_text(json.dumps(jobs[i::2]))
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(file)]
        with open(folder / f"log_{i}.txt", "w") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=600) for process in running]
    if any(codes):
        raise RuntimeError("\n".join((folder / f"log_{i}.txt").read_text()[-4000:] for i, c in enumerate(codes) if c))
