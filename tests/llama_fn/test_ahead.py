"""Steps that another process compiles while a start compiles its first one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_fn import compat
from llama_fn.compiler import kept
from llama_fn.config_fields import flat
from llama_fn.run import ahead, compiling, kept_steps
from llama_fn.run.ahead import Step, compiled_ahead
from sharding import Mesh

ROOT = Path(__file__).resolve().parents[2]
# A helper that does nothing for long, with a compiler that it runs.
LONG = """
import pathlib, subprocess, sys, os
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
child.wait()
"""


@pytest.fixture
def cfg(tiny_config, tmp_path):
    cfg = tiny_config()
    return replace(cfg, run=replace(cfg.run, backend="inductor", device="cpu", compile_cache=str(tmp_path / "cache")))


def wait_for(what):
    until = time.monotonic() + 60
    while not what() and time.monotonic() < until:
        time.sleep(0.01)
    return what()


def lives(pid):
    """A process whose parent has not asked for its status yet is dead, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(compat.physical_cores() < 2, reason="two cores are missing; with one nobody compiles ahead")
def test_the_evaluation_is_compiled_by_another_process(cfg, monkeypatch):
    def trace(cfg):
        raise AssertionError("traced here")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as in a process that was told so; code depends on it
    monkeypatch.setitem(compiling.STEPS, compiling.EVALUATE, (trace, compiling.STEPS[compiling.EVALUATE][1]))
    train, evaluate = compiling.compile(cfg, Mesh(), None, None, with_eval=True)
    assert not train[cfg.data.microbatches].from_cache and evaluate.from_cache


def test_a_helper_that_fails_is_said_and_its_step_left_to_who_asked(cfg, monkeypatch, caplog):
    for command, status, why in (
        ((sys.executable, "-c", "import sys; sys.exit('no room')"), 1, "no room"),
        (("/nowhere/python",), -1, "[Errno 2] No such file or directory: '/nowhere/python'"),
    ):
        monkeypatch.setattr(ahead, "COMMAND", command)
        with compiled_ahead([Step("evaluate", cfg)], 1) as finish:
            finish(Step("evaluate", cfg))
        said = f"evaluate, for batches of {cfg.data.global_batch_size} samples, and failed (status {status}): {why}"
        assert caplog.messages[-1] == f"another process was to compile {said}"


def test_only_what_is_missing_is_left_to_others_and_one_step_is_kept(cfg, tmp_path):
    wanted = [Step(which, cfg) for which in compiling.STEPS]
    steps = compiling._Steps(cfg, Mesh(), None, None, None, tmp_path)
    assert steps.left_to_others(wanted) == wanted[1:]
    assert replace(steps, cache=None).left_to_others(wanted) == []
    entry = kept._entry(tmp_path, kept_steps.key(cfg, compiling.TRAIN, None))
    entry.parent.mkdir()
    entry.touch()
    assert steps.left_to_others(wanted) == []


def test_helpers_and_what_they_run_end_with_the_block_and_a_step_not_begun_is_given_back(cfg, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    monkeypatch.setattr(ahead, "COMMAND", (sys.executable, "-c", LONG, str(pids)))
    with pytest.raises(KeyError), compiled_ahead([Step("train", cfg), Step("evaluate", cfg)], 1) as finish:
        finish(Step("evaluate", cfg))  # at once
        assert wait_for(lambda: pids.exists() and pids.read_text())
        raise KeyError
    assert wait_for(lambda: not any(map(lives, pids.read_text().split())))


@pytest.mark.slow
def test_a_helper_does_not_outlive_the_start_that_asked_for_it(cfg, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    helper = subprocess.Popen([*ahead.COMMAND, "train"], stdin=subprocess.PIPE, env=env, start_new_session=True)
    helper.stdin.write(json.dumps(flat(cfg)).encode() + b"\n")
    helper.stdin.flush()
    assert wait_for((tmp_path / "cache").exists)
    helper.stdin.close()
    assert helper.wait(10) == -9
