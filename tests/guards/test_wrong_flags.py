"""What wrong flags end in: status 2, one paragraph, nothing written."""

from __future__ import annotations

import subprocess
import sys

import pytest
from guard_runs import ROOT, attempt, flags

from tests.forks import outcomes

WRONG = [
    ("--optim.lr=-1", "--optim.lr=-1.0 must be at least 0"), ("--optim.lr=nan", "--optim.lr=nan must be"),
    ("--optim.lr=inf", "--optim.lr=inf must be"), ("--optim.warmup_steps=-5", "must be at least 0"),
    ("--model.rope_theta=0", "must be above 0"), ("--model.norm_eps=-1", "must be from 0 to 1"),
    ("--optim.b2=1", "must be from 0 to"), ("--optim.eps=0", "must be above 0"),
    ("--run.threads=-1", "must be from 0 to"), ("--data.split=²,1", "up to three non-negative numbers"),
    ("--data.split=", "up to three"), ("--run.seed=-1", "must be from 0 to"), ("--run.seed=4294967296", "must be from"),
    ("--run.steps=0", "must be at least 1"), ("--run.steps=1000000000000", "must be at least 1"),
    ("--run.steps=1000000000", "GB are free. Lower --run.steps"), ("--run.timeout_s=0", "must be at least 1"),
    ("--run.workdir=", "--run.workdir is empty"), ("--run.dump_ranks=7", "this run has ranks 0 to 0"),
    ("--run.dump_ranks=²", "neither all nor ranks"), ("--run.profile_steps=3:9", "within 1..4"),
    ("--mesh.axes=data:²", "is not NAME:SIZE"), ("--data.tokenizer=/nowhere/t.model", "no such file"),
    ("--data.path=/nowhere", "no such file or folder"), ("--data.seq_len=0", "must be at least 1"),
    ("--model.vocab_size=0", "must be at least 1"), ("--data.global_batch_size=3", "3 is not divisible"),
    ("--model.num_layers=100000", "must be from 1 to 1000"), ("--optim.min_lr=1e39", "must be at least 0"),
    ("--run.device=gpu", "expected auto, cpu, cuda or npu"), ("--run.stop_after_skipped=-1", "must be at least 0"),
    ("--model.preset=llama", "Did you mean"),
]  # fmt: skip


def arguments(flag, prefix, folder):
    more = ["--data.microbatches=2"] if "batch_size=3" in flag else []
    more += [f"--run.dump_dir={folder / 'dump'}"] if "dump_ranks" in flag else []
    more += ["--data.path="] if "tokenizer" in flag else []
    return flags(prefix, folder / "run", flag, *more)


@pytest.fixture(scope="module")
def starts(prefix, tmp_path_factory):
    """(folder, outcome) by flag."""
    folders = {flag: tmp_path_factory.mktemp("start") for flag, _ in WRONG}
    commands = [(str(ROOT), ["train.py", *arguments(flag, prefix, folders[flag])]) for flag, _ in WRONG]
    return {flag: (folders[flag], out) for (flag, _), out in zip(WRONG, outcomes(commands), strict=True)}


@pytest.mark.parametrize("flag, message", WRONG, ids=lambda x: x[:30])
def test_wrong_flags_write_nothing(flag, message, starts):
    folder, out = starts[flag]
    said = out.stderr
    assert out.returncode == 2 and message in said and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("error: ") and len(said) < 900
    if "steps=1000000000" not in flag:  # which is known once data is opened
        assert not list(folder.iterdir())


def test_what_is_asked_for_and_not_given_is_said(workdir, prefix):
    status, said = attempt(prefix, workdir, run__steps=6, run__profile_steps="2:3", run__accept_changes=True)
    assert status == 0 and "--run.profile_steps=2:3 lies before iteration 4" in said
    status, said = attempt(prefix, workdir, run__dump_ranks="0,1", run__dump_dir=str(workdir / "d"))
    assert status == 2 and "this run has ranks 0 to 0" in said


def test_flagfiles_name_others_beside_them_from_every_folder(prefix, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "outer.flags").write_text("# a comment\n--flagfile=b/inner.flags\n\n--run.steps=3\n")
    (tmp_path / "a" / "b" / "inner.flags").write_text("\n".join(flags(prefix, tmp_path / "run")))
    command_line = [sys.executable, str(ROOT / "train.py"), "--flagfile", "a/outer.flags"]
    out = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and "done: 3 iterations" in out.stderr, out.stderr
    (tmp_path / "a" / "b" / "inner.flags").write_text("--flagfile=../outer.flags")
    for name, message in (("a/outer.flags", "names itself"), ("a", "Is a directory"), ("", "cannot be read")):
        out = subprocess.run([*command_line[:-2], f"--flagfile={name}"], cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 2 and message in out.stderr and "Traceback" not in out.stderr, out.stderr
