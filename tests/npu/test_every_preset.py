"""Nightly: the whole step of every preset, all layers, through the real torchair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import SHAPES, job
from test_lowering import check_layers, counts

from llama_fn.model import presets


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES, "llama_65b_8layers"])
def test_the_whole_preset_lowers(name, tmp_path, torch_npu_environment):
    whole = job("data:8,model:4", model__preset=name, model__compute_dtype="bf16", data__seq_len=2048)
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps([{**whole, "out": str(tmp_path / name)}]))
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(file)]
    done = subprocess.run(command, env=torch_npu_environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    check_layers(counts(tmp_path / name), presets.preset(name).num_layers)
