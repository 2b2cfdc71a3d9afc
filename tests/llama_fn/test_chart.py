"""Charts of losses: what was logged, smoothed as the formula says, in the terminal and as an image."""

from __future__ import annotations

import math
import subprocess
import sys
from types import MappingProxyType

import pytest

from llama_fn.run import metrics
from llama_fn.run.records import smoothed
from llama_fn.tools.chart import read


def named(validation):
    return {} if validation is None else metrics.validation({"wiki": validation})


def write(folder, losses, validation=MappingProxyType({})):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        "".join(
            metrics.as_json({"iteration": i, "lm_loss": loss, **named(validation.get(i))}) + "\n"
            for i, loss in losses.items()
        )
    )
    return folder


def test_smoothing_weighs_the_past_and_has_no_bias():
    losses = {1: 4.0, 2: 2.0, 3: 3.0}
    assert smoothed(losses, 0.0) == losses
    got, w = smoothed(losses, 0.5), [1 / 4, 1 / 2, 1]
    assert got[1] == 4.0 and got[3] == pytest.approx((w[0] * 4 + w[1] * 2 + w[2] * 3) / sum(w))


def test_what_is_not_finite_is_left_out_and_validation_is_read(tmp_path):
    curve = read(write(tmp_path / "a", {1: 4.0, 2: math.nan, 3: 2.0}, {2: 3.5}), 0.0)
    assert curve.losses == {1: 4.0, 3: 2.0} and curve.validation == {2: 3.5} and curve.name == "a"


def test_two_runs_in_the_terminal_and_as_an_image(tmp_path):
    a = write(tmp_path / "first", {i: 8 / i for i in range(1, 50)}, {20: 1.0})
    b = write(tmp_path / "second", {i: 9 / i for i in range(1, 50)})
    command = [sys.executable, "-m", "llama_fn.tools.chart", str(a), str(b), f"--png={tmp_path / 'both.png'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("first", "first, validation", "second", "nats per token", "49"))
    assert "\x1b[" not in done.stdout and len(done.stdout.splitlines()[0]) <= 100
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
