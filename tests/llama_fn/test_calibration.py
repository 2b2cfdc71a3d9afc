"""The report of check_npu --graphs: what is measured, here on a CPU, and what a plan makes of it."""

from __future__ import annotations

import json

import pytest

from llama_fn.errors import UserError
from llama_fn.hardware import TABLE
from llama_fn.planner import config_stages, plan
from llama_fn.planner.calibration import FORMAT, calibrated
from llama_fn.tools import npu_ladder
from sharding import Mesh

NPU = TABLE["ascend_910b1"]
AXES = [
    {"axis": "data", "devices": 4, "inside": False, "bytes_per_s": 20e9},
    {"axis": "model", "devices": 8, "inside": True, "bytes_per_s": 150e9},
    {"axis": "context", "devices": 2, "inside": True, "bytes_per_s": 170e9},
]
REPORT = {
    "format": FORMAT, "hardware": "ascend_910b1", "date": "2026-11-27", "matmul_flops_per_s": 300e12,
    "hbm_bytes_per_s": 1.2e12, "axes": AXES, "graphs": [],
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(**changes):
        path = tmp_path / "report.json"
        path.write_text(json.dumps(REPORT | changes))
        return path

    return write


def test_measured_rates_stand_for_the_data_sheets(written):
    found = calibrated(NPU, written())
    assert (found.peak_flops_per_s, found.hbm_bytes_per_s) == (300e12, 1.2e12)
    assert (found.link_bytes_per_s, found.network_bytes_per_s) == (150e9, 20e9), "the slowest of each kind"
    assert found.rated_flops_per_s == NPU.peak_flops_per_s and "measured 2026-11-27" in found.source


def test_what_was_not_measured_stays_as_published(written):
    found = calibrated(NPU, written(axes=[]))
    assert found.link_bytes_per_s == NPU.link_bytes_per_s
    assert "link_bytes_per_s, network_bytes_per_s as published" in found.source


def test_a_plan_takes_the_rates_and_counts_mfu_from_the_rated_ones(tiny_config, written):
    cfg, slow = tiny_config(), calibrated(NPU, written(hbm_bytes_per_s=NPU.hbm_bytes_per_s / 2))
    a, b = (plan.make(cfg, config_stages.mesh(cfg), device) for device in (slow, NPU))
    assert a.step_time_s > 1.5 * b.step_time_s, "so small a step reads and writes"
    assert a.mfu == pytest.approx(a.model_flops / a.step_time_s / NPU.peak_flops_per_s)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, r"report\.json is no report of format llama_fn\.check_npu/1"),
        ({"hardware": "ascend_910b4"}, "was measured on ascend_910b4 and --hardware is ascend_910b1"),
        ({"hbm_bytes_per_s": -1}, "hbm_bytes_per_s is -1, and should be a positive number"),
        ({"axes": [{"devices": 2}]}, "axes should be a list of rows with"),
        ({"matmul_flops_per_s": None, "hbm_bytes_per_s": None, "axes": []}, "has no rates"),
    ],
)
def test_a_report_that_is_none_is_refused(written, changes, said):
    with pytest.raises(UserError, match=said):
        calibrated(NPU, written(**changes))


@pytest.mark.slow
def test_a_step_of_the_ladder_is_predicted_and_measured_beside_the_eager_one():
    (rung,) = npu_ladder.rungs(["tiny"])
    row = {"name": rung.name, "predicted": npu_ladder.predicted(rung, NPU)}
    assert row["predicted"]["streams"] == 1 and row["predicted"]["ops"] > 500
    row["measured"] = found = npu_ladder.measured(rung, rung.lowered.compile("eager"), "cpu")
    assert found["apart"] == 0.0 and found["losses"] == found["losses_on_cpu"] and found["step_s"] > 0
    assert "predicted: compiled in" in npu_ladder.as_line(row) and "0.0e+00 from the CPU's" in npu_ladder.as_line(row)


def test_rates_are_positive_and_steps_have_names():
    assert all(rate > 0 for rate in npu_ladder.rates("cpu", 64, 2**16).values())
    with pytest.raises(UserError, match=r"--ladder=1bb is no step of the ladder\. Did you mean 1b\?"):
        npu_ladder.rungs(["1bb"])


@pytest.mark.slow
def test_the_ladder_fits_an_npu():
    for name in ("1b", "7b_8layers", "65b_2layers"):
        preset, layers, dtype, length, batch, _ = npu_ladder.LADDER[name]
        cfg = npu_ladder.config(preset, layers, dtype, length, batch)
        assert plan.make(cfg, Mesh(), NPU).fits, name
