"""compare_loss: aligned by iteration, the bound decides the exit status, wrong files are named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llama_fn.errors import UserError
from llama_fn.tools.compare_charts import COMPARE_CHART, LOSS_CHART
from llama_fn.tools.compare_loss import compare, read_values, report


def write(folder, losses):
    folder.mkdir()
    rows = [json.dumps({"iteration": i, "lm_loss": loss}) for i, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def run(*args):
    command = [sys.executable, "-m", "llama_fn.tools.compare_loss", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_errors_are_relative_to_the_reference_and_aligned(tmp_path):
    a = read_values(write(tmp_path / "a", {1: 10.0, 2: 8.2, 4: 6.0}))
    b = read_values(write(tmp_path / "b", {2: 8.0, 3: 7.0, 4: 6.3}))
    found = compare(a, b)
    assert found.iterations == [2, 4]
    assert found.errors == pytest.approx([0.2 / 8.0, 0.3 / 6.3])
    assert found.peak == pytest.approx(0.3 / 6.3) and found.mean == pytest.approx((0.025 + 0.3 / 6.3) / 2)
    assert "peak relative error 0.047619 at iteration 4" in report(found, 1, 0.02)


def test_the_bound_decides_and_the_charts_are_drawn(tmp_path):
    a = write(tmp_path / "a", {i: 8.0 / i * 1.01 for i in range(1, 30)})
    b = write(tmp_path / "b", {i: 8.0 / i for i in range(1, 30)})
    good = run(a, b, f"--out={tmp_path / 'charts'}")
    assert good.returncode == 0, good.stderr
    assert "below the bound 0.02" in good.stdout
    for name in (LOSS_CHART, COMPARE_CHART):
        assert (tmp_path / "charts" / name).read_bytes().startswith(b"\x89PNG")
    bad = run(a, b, "--bound=0.005", "--nocharts")
    assert bad.returncode == 1 and "NOT below" in bad.stdout


def test_wrong_files_are_named(tmp_path):
    missing = run(tmp_path / "none", tmp_path)
    assert missing.returncode == 2 and "none" in missing.stderr
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 2.0}\nnot json\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_values(tmp_path)
    with pytest.raises(UserError, match="no iteration in common"):
        compare({1: 1.0}, {2: 1.0})
    assert "two runs" in run(tmp_path).stderr


def test_several_runs_are_compared_smoothed_and_by_their_gradient_norm(tmp_path):
    def noisy(name, drift):
        folder = write(tmp_path / name, {})
        rows = [{"iteration": i, "lm_loss": 2.0, "grad_norm": drift(i) * (1.1 if i % 2 else 0.9)} for i in range(1, 99)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    one, two = noisy("one", lambda i: 1.0), noisy("two", lambda i: 1 + i / 100)
    reference = write(tmp_path / "reference", {})
    rows = [{"iteration": i, "lm_loss": 2.0, "grad_norm": 1.0} for i in range(1, 99)]
    (reference / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = run(one, two, reference, "--nocharts")
    assert same.returncode == 0 and same.stdout.count("peak relative error 0.000000") == 2
    norms = run(one, two, reference, "--value=grad_norm", "--smooth=0.9", "--bound=0.11", f"--out={tmp_path}")
    assert norms.returncode == 1, norms.stderr
    assert "one, 98 iterations" in norms.stdout and "; below the bound" in norms.stdout.split("two")[0]
    assert "two, 98 iterations" in norms.stdout and "NOT below" in norms.stdout
    assert (tmp_path / COMPARE_CHART).exists()
    assert run(one, two, "--names=a", "--nocharts").returncode == 2
    nothing = run(write(tmp_path / "old", {1: 2.0}), reference, "--value=grad_norm", "--nocharts")
    assert nothing.returncode == 2 and "grad_norm of iteration 1 is None" in nothing.stderr
