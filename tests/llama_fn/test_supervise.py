"""A supervised command is started again after what a start again can mend, and after nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from operation_runs import staged, start, training

from llama_fn.operations import state

ROOT = Path(__file__).resolve().parents[2]
# Does what the next line of WORKDIR/plan says, and notes with which words it was called.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from operation_runs import end, spent, start, training
from llama_fn.run.workdir_lock import WorkdirLock
work = Path(sys.argv[2])
plan = (work / "plan").read_text().splitlines()
count = len((work / "calls").read_text().splitlines()) if (work / "calls").exists() else 0
with open(work / "calls", "a") as f:
    f.write(" ".join(sys.argv[3:]) + "\\n")
do = json.loads(plan[min(count, len(plan) - 1)])
ago = do.get("ago", 0.0)
def tell(*events):
    with open(work / "events.jsonl", "a") as f:
        f.writelines(json.dumps(event) + "\\n" for event in events)
tell(start(ago), training(ago), spent(ago, do.get("iteration", 0)))
print(do.get("say", "trains"), flush=True)
if "sleep" in do:
    lock = WorkdirLock(work).acquire()
    signal.signal(signal.SIGTERM, lambda *_: (tell(end(5)), lock.release(), sys.exit(5)))
    (work / "sleeps").touch()
    time.sleep(do["sleep"])
if do.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
if "end" in do:
    tell(end(do["end"], "it said so", ago=0.0, iteration=do.get("iteration", 0)))
sys.exit(do.get("status", 0))
"""


@pytest.fixture
def supervised(tmp_path):
    """Starts the tool with a plan; its process, and what the command was called with so far."""
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "fake.py").write_text(FAKE)

    def run(plan, *flags, words=()):
        (work / "plan").write_text("\n".join(map(json.dumps, plan)))
        command = [sys.executable, str(tmp_path / "fake.py"), str(ROOT / "tests/llama_fn"), str(work), *words]
        tool = [sys.executable, "-m", "llama_fn.tools.supervise", f"--workdir={work}", "--wait_s=0.01", "--look_s=0.1"]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*tool, *flags, "--", *command],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, lambda: (work / "calls").read_text().splitlines()

    run.work = work
    return run


def ended(started):
    process, calls = started
    out, err = process.communicate(timeout=120)
    return process.returncode, len(calls()), out, err


def test_crashes_are_started_again_until_it_is_done(supervised):
    plan = [
        {"status": 3, "iteration": 10},
        {"kill": True, "iteration": 20},
        {"status": 5, "iteration": 30},
        {"say": "last"},
    ]
    status, count, out, err = ended(supervised(plan))
    assert status == 0 and count == 4 and out.splitlines() == ["trains"] * 3 + ["last"]
    for words in (
        "ended at iteration 10: status 3",
        "ended at iteration 20: killed by SIGKILL",
        "in 0 s",
        "status 0: done",
    ):
        assert words in err, err
    logs = sorted((supervised.work / "supervise").glob("start_*.log"))
    assert [log.read_text() for log in logs] == ["trains\n"] * 3 + ["last\n"]


@pytest.mark.parametrize(
    ("one", "status"),
    [({"status": 2}, 2), ({"status": 4}, 4), ({"status": 1, "end": 4}, 4), ({"status": 1, "end": 2}, 2)],
)
def test_what_would_come_again_is_left_alone(one, status, supervised):
    """torchrun makes 1 of every status: the work folder knows better."""
    assert ended(supervised([one]))[:2] == (status, 1)


def test_a_launchers_failure_is_a_crash(supervised):
    assert ended(supervised([{"status": 1, "end": 3}, {"status": 1}, {}]))[:2] == (0, 3)


def test_starts_that_get_no_further_are_limited_and_progress_counts(supervised):
    plan = [{"status": 3, "iteration": n} for n in (10, 10, 10, 20, 20, 20, 20)]
    status, count, _, err = ended(supervised(plan, "--most=2"))
    assert status == 7 and count == 7 and "got no further than iteration 20: giving up" in err


def test_a_run_that_stands_still_is_stopped_and_started_again(supervised):
    plan = [{"iteration": 5, "sleep": 600}, {"iteration": 9}]
    status, count, _, err = ended(supervised(plan, "--prepare_minutes=0.1"))
    assert status == 0 and count == 2, err
    assert re.search(r"it is running but not progressing, no new iteration for 0:0[67]", err) and "stopping it" in err


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_a_clock_that_jumps_is_no_standing_still_and_hides_none(jump_s, tmp_path, monkeypatch):
    clock = SimpleNamespace(time=1e9, monotonic=50.0)
    monkeypatch.setattr(state, "time", SimpleNamespace(time=lambda: clock.time, monotonic=lambda: clock.monotonic))

    def passes(seconds, jump=0.0):
        clock.time, clock.monotonic = clock.time + seconds + jump, clock.monotonic + seconds
        return watcher.look().condition

    def records(*losses):
        for event in events:
            event["time"] = clock.time
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        staged(tmp_path / "work", events, losses)
        os.utime(tmp_path / "work" / "metrics.jsonl", (clock.time,) * 2)

    watcher, events = state.Watcher(tmp_path / "work"), [start(), training()]
    records(3.0, 3.0, 3.0)
    assert passes(5) == passes(5, jump_s) == state.Condition.RUNNING
    records(3.0, 3.0, 3.0, 3.0)
    assert passes(5) == passes(50) == state.Condition.RUNNING
    assert passes(20) == state.Condition.STUCK


def test_a_signal_is_passed_on_and_ends_the_supervising(supervised):
    process, calls = supervised([{"sleep": 600}])
    while not (supervised.work / "sleeps").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, count, _, err = ended((process, calls))
    assert status == 5 and count == 1 and "asked to stop" in err


def test_a_host_that_others_name_again_and_again_is_left_out(supervised):
    said = "rank 0 gives up: rank 3 on node-b has given no sign of life for 600 s (in step 7)"
    plan = [{"status": 3, "say": said}, {"status": 3, "say": said}, {}]
    started = supervised(plan, words=["--nodes=2", "--exclude={exclude}"])
    assert ended(started)[0] == 0
    assert started[1]() == ["--nodes=2", "--nodes=2", "--nodes=2 --exclude=node-b"]


def test_wrong_words_are_told(tmp_path):
    for words, said in (
        (["--workdir=x"], "give --workdir"),
        ([f"--workdir={tmp_path}", "--", "no_such"], "is no program"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "llama_fn.tools.supervise", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and said in done.stderr
