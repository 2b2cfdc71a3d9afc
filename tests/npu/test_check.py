"""check_npu --graphs where torch_npu and CANN are there, and no device: graphs, commands and predictions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ge_interpreter import _messages

from llama_fn.inspect import dump
from llama_fn.planner.calibration import FORMAT

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_without_a_device_graphs_are_written_and_nothing_is_measured(tmp_path, torch_npu_environment):
    command = [sys.executable, str(Path(__file__).with_name("worker_check.py"))]
    done = subprocess.run(
        [*command, f"--graphs={tmp_path}", "--ladder=tiny"], cwd=ROOT, env=torch_npu_environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_bytes())
    (row,) = report["graphs"]
    assert report["format"] == FORMAT and report["torch_npu"] == "2.13.0" and row["measured"] is None
    assert row["predicted"]["ops"] > 500 and "tiny" in done.stdout
    model = _messages().ModelDef()
    model.ParseFromString((tmp_path / "tiny" / dump.GE_AIR).read_bytes())
    (graph,) = model.graph
    types = {op.type for op in graph.op}
    assert {"RefData", "FlashAttentionScoreGrad", "NetOutput"} <= types, "what atc reads: a ModelDef with our graph"
    lines = (tmp_path / "atc.sh").read_text().splitlines()
    assert lines[0] == "set -ex" and lines[1].startswith(f"time atc --framework=1 --model={tmp_path}/tiny/")
    assert "--soc_version=Ascend910B1 --topo_sorting_mode=3" in lines[1]
