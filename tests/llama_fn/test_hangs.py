"""A step that does not end: the process gives up, and says where its threads stood."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llama_fn.distributed.hangs import STUCK, GivingUp
from llama_fn.operations.state import Condition, look

ROOT = Path(__file__).resolve().parents[2]

# The third step of a run waits for what never comes, as one does whose device or network stands still.
WORKER = """
    import sys, time
    from dataclasses import replace
    from llama_fn.compiler.backends import eager
    from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig
    from llama_fn.run import loop

    def compile(program, **options):
        made, calls = eager.compile(program, **options), []
        def run(flat):
            calls.append(1)
            waiting_for_a_device(len(calls))
            return made.run(flat)
        return replace(made, run=run)

    def waiting_for_a_device(call):
        time.sleep(1000 if call == 3 else 0)

    model = ModelConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, mlp_dim=16, vocab_size=512)
    run = RunConfig(workdir=sys.argv[1], steps=10, eval_every=0, step_limit_s=int(sys.argv[3]), tensorboard=False)
    data = DataConfig(path=sys.argv[2], seq_len=8, global_batch_size=2)
    sys.exit(loop.run(Config(model=model, data=data, run=run), "", compile))
"""


def test_a_step_that_does_not_end_is_given_up_with_a_report(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes((ROOT / "llama_fn" / "config.py").read_bytes() * 2)
    workdir = tmp_path / "work"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(workdir), str(text), "4"],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == STUCK, done.stderr[-3000:]
    assert "rank 0 gives up: iteration 3 takes longer than 4 s (--run.step_limit_s)" in done.stderr
    (report,) = (workdir / "stuck").iterdir()
    said = report.read_text()
    assert str(report) in done.stderr.replace("\n", "")
    assert "waiting_for_a_device" in said and "step-watch" not in said.splitlines()[0] and "VmRSS" in said
    last = json.loads((workdir / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["status"], last["iteration"]) == ("end", STUCK, 2)
    state = look(workdir)
    assert state.condition is Condition.FAILED and "iteration 3 takes longer" in state.words


def test_a_report_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    words = GivingUp(0, tmp_path / "file" / "stuck")._report("why")
    assert "could not be written" in words


class GaveUp(Exception):
    pass


def watching(step, timeout=10.0):
    """A watchdog of rank 0, which begins `step` now, without a store."""
    from llama_fn.distributed.watchdog import Watchdog

    def give_up(status, why):
        raise GaveUp(why)

    dog = Watchdog.__new__(Watchdog)
    dog.rank, dog.world, dog.timeout, dog.give_up = 0, 2, timeout, give_up
    dog.seen = {1: (b"", time.monotonic())}
    dog.begin(step)
    return dog


def test_steps_that_pass_while_a_word_is_under_way_are_no_lag(monkeypatch):
    """Words come every few seconds: those of quick steps are always behind this rank's, for hours."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = watching(0)
    for step in range(0, 4000, 40):
        dog.begin(step)
        clock[0] += 1.0
        dog._judge(1, f"{clock[0]} {max(0, step - 30)} n1".encode())


def test_a_rank_that_has_not_begun_the_step_in_which_this_one_waits_is_stuck(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = watching(7)
    for _ in range(10):
        clock[0] += 1.0
        dog._judge(1, f"{clock[0]} 6 n1".encode())
    clock[0] += 1.0
    with pytest.raises(GaveUp, match="rank 1 on n1 was last heard of in step 6, and this rank waits in step 7"):
        dog._judge(1, f"{clock[0]} 6 n1".encode())
    dog.begin(5)  # gone back from a spike: the other's word is of before
    dog._judge(1, f"{clock[0]} 8 n1".encode())
    clock[0] += 11.0
    with pytest.raises(GaveUp, match="no sign of life for 10 s"):
        dog._judge(1, b"1011.0 8 n1")
        dog._judge(1, b"1011.0 8 n1")
    clock[0] += 11.0
    with pytest.raises(GaveUp, match="rank 1 on n1 was last heard of before its first step"):
        dog._judge(1, b"1022.0 -1 n1")
