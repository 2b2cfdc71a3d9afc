"""What mistakes, damaged work folders and odd environments end in: a status, one paragraph, nothing moved."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llama_fn.config import Config
from llama_fn.config_fields import with_values
from llama_fn.data import writer
from llama_fn.run import loop, workdir_lock
from llama_fn.tools import command

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "model.num_layers": 1, "model.embed_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 2, "model.mlp_dim": 48,
    "model.vocab_size": 64, "data.seq_len": 16, "data.global_batch_size": 4, "run.steps": 4, "run.checkpoint_every": 2,
    "run.eval_every": 0, "run.backend": "eager", "run.tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x"
    random = np.random.default_rng(0)
    writer.write(path, [random.integers(0, 64, n) for n in random.integers(5, 60, 200)], np.uint16)
    return path


@pytest.fixture(scope="module")
def trained(prefix, tmp_path_factory):
    """A work folder with four iterations, checkpoints 2 and 4; to be copied."""
    workdir = tmp_path_factory.mktemp("trained")
    assert attempt(prefix, workdir)[0] == 0
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def attempt(prefix, workdir, **flags):
    """(status, what is said) of a run in this process."""
    values = {**SMALL, "data.path": str(prefix), "run.workdir": str(workdir)}
    values |= {name.replace("__", "."): value for name, value in flags.items()}
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = command.status_of(lambda: loop.run(with_values(Config(), values), "--x=1\n"))
    return status, said.getvalue()


def flags(prefix, workdir, *more):
    values = {**SMALL, "data.path": str(prefix), "run.workdir": str(workdir)}
    return [f"--{name}={value}" for name, value in values.items()] + list(more)


def train(*arguments, **environ):
    env = {**os.environ, **environ}
    return subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def picture(folder):
    """Every file below and what it holds, but for locks and the list of what was verified."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if (path.is_file() or path.is_symlink()) and path.name not in (workdir_lock.FILE, "verified.json")
    }


def iterations(workdir):
    return [json.loads(line)["iteration"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


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


@pytest.mark.parametrize("flag, message", WRONG, ids=lambda x: x[:30])
def test_wrong_flags_write_nothing(flag, message, prefix, tmp_path):
    extra = ["--data.microbatches=2"] if "batch_size=3" in flag else []
    extra += [f"--run.dump_dir={tmp_path / 'dump'}"] if "dump_ranks" in flag else []
    extra += ["--data.path="] if "tokenizer" in flag else []
    out = train(*flags(prefix, tmp_path / "run", flag, *extra))
    assert out.returncode == 2 and message in out.stderr and "Traceback" not in out.stderr, out.stderr
    assert out.stderr.splitlines()[-1].startswith("error: ") and len(out.stderr) < 900
    if "steps=1000000000" not in flag:  # which is known once data is opened
        assert not list(tmp_path.iterdir())


def damage_meta(w):
    path = w / "checkpoints" / "4" / "meta" / "metadata"
    content = bytearray(path.read_bytes())
    content[content.index(b"consumed_samples") + 20] ^= 1
    path.write_bytes(content)


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def replaced(path, by):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    by(path)


# (what is done to the work folder, status of the next start, what it says, whether it may change anything)
FOLDERS = {
    "checkpoint_is_a_file": (lambda w: replaced(w / "checkpoints" / "4", Path.touch), 2, "4 is no folder"),
    "dangling_checkpoint": (
        lambda w: replaced(w / "checkpoints" / "4", lambda p: p.symlink_to("gone")), 2, "a link to gone, which is not"),
    "checkpoints_is_a_file": (lambda w: replaced(w / "checkpoints", Path.touch), 2, "cannot be read: File exists"),
    "workdir_is_a_file": (lambda w: replaced(w, Path.touch), 2, "is no folder"),
    "workdir_is_a_dangling_link": (lambda w: replaced(w, lambda p: p.symlink_to("gone")), 2, "is no folder"),
    "damaged_cannot_be_moved": (
        lambda w: (damage_meta(w), write(w / "damaged")), 2, "is damaged and cannot be moved"),
    "metrics_is_a_folder": (lambda w: replaced(w / "metrics.jsonl", Path.mkdir), 2, "metrics.jsonl: Is a directory"),
    "log_is_a_folder": (lambda w: replaced(w / "train.log", Path.mkdir), 2, "train.log: Is a directory"),
    "flags_is_a_folder": (lambda w: replaced(w / "flags.txt", Path.mkdir), 2, "flags.txt"),
    "lock_is_a_folder": (lambda w: replaced(w / "run.lock", Path.mkdir), 2, "run.lock: Is a directory"),
    "damaged_meta": (damage_meta, 0, "checkpoint .*4 is damaged .meta/metadata"),
    "missing_state": (lambda w: shutil.rmtree(w / "checkpoints" / "4" / "state"), 0, "4 is damaged .state/"),
    "no_list": (lambda w: (w / "checkpoints" / "4" / "sums.json").unlink(), 0, "resuming from iteration 4"),
    "orphan_of_a_killed_save": (
        lambda w: write(w / "checkpoints" / "6.orbax-checkpoint-tmp" / "x"), 0, "resuming from iteration 4"),
    "empty_lock": (lambda w: write(w / "run.lock"), 0, "resuming from iteration 4"),
    "garbage_in_lock": (lambda w: write(w / "run.lock", b"\xff{"), 0, "resuming from iteration 4"),
    "lock_of_a_dead_process": (
        lambda w: write(w / "run.lock", json.dumps({**workdir_lock._me(), "pid": 2**22 - 3}).encode()), 0, "resuming"),
    "damaged_tail_of_metrics": (
        lambda w: (w / "metrics.jsonl").open("ab").write(b'{"iteration": 1, "lm_loss": 4.1}\n\xff\xfe{"it'), 0,
        "line 5 is no record"),
    "garbage_in_verified": (lambda w: write(w / "data" / "verified.json", b"{"), 0, "resuming from iteration 4"),
    "metrics_are_gone": (lambda w: (w / "metrics.jsonl").unlink(), 0, "resuming from iteration 4"),
    "config_is_gone": (lambda w: (w / "config.json").unlink(), 0, "resuming from iteration 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_work_folders_are_told_or_healed(name, workdir, prefix):
    import re

    harm, want, message = FOLDERS[name]
    harm(workdir)
    before = picture(workdir.parent)
    status, said = attempt(prefix, workdir, run__steps=4)
    assert status == want and re.search(message, said) and "Traceback" not in said, said
    if status == 2:
        after = picture(workdir.parent)
        assert {k: v for k, v in after.items() if not k.endswith((".json", ".txt"))} == {
            k: v for k, v in before.items() if not k.endswith((".json", ".txt"))
        }, "nothing moved"
        assert said.count("error: ") == 1
    else:
        assert (workdir / "checkpoints" / "4").is_dir() and iterations(workdir)[-1:] in ([4], [])


def test_another_model_in_the_same_folder_moves_nothing_and_the_right_one_goes_on(workdir, prefix):
    before = picture(workdir)
    status, said = attempt(prefix, workdir, model__num_layers=2, run__accept_changes=True)
    assert status == 2 and "state.params.layers.wq: saved f32[1,32,2,16], needed f32[2,32,2,16]" in said
    assert picture(workdir) == before
    status, said = attempt(prefix, workdir, model__num_layers=2)
    assert status == 2 and "--model.num_layers: was 1, now 2" in said and picture(workdir) == before
    status, said = attempt(prefix, workdir, run__steps=6, run__accept_changes=True)
    assert status == 0 and "resuming from iteration 4" in said and iterations(workdir) == [1, 2, 3, 4, 5, 6]


def test_a_permission_is_given_once(prefix, tmp_path):
    out = train(*flags(prefix, tmp_path, "--run.accept_changes"))
    assert out.returncode == 0, out.stderr
    assert "accept_changes" not in (tmp_path / "flags.txt").read_text() + (tmp_path / "config.json").read_text()
    out = train(f"--flagfile={tmp_path / 'flags.txt'}", "--optim.lr=0.5")
    assert out.returncode == 2 and "--optim.lr: was 0.0003, now 0.5" in out.stderr


def test_other_data_under_the_same_flags_is_refused(workdir, prefix, tmp_path):
    other = tmp_path / prefix.name
    random = np.random.default_rng(1)
    writer.write(other, [random.integers(0, 64, n) for n in random.integers(5, 60, 200)], np.uint16)
    for path in prefix.parent.glob("x.*"):
        shutil.copy(path, tmp_path / f"kept{path.suffix}")
    saved = json.loads((workdir / "config.json").read_text())["data.path"]
    try:
        for path in other.parent.glob("x.*"):
            shutil.copy(path, prefix.parent)
        status, said = attempt(prefix, workdir)
        assert status == 2 and f"--data.path={saved} is not the data that iteration 4" in said
    finally:
        for suffix, name in ((".bin", "x.bin"), (".idx", "x.idx"), (".json", "x.sums.json")):
            shutil.copy(tmp_path / f"kept{suffix}", prefix.parent / name)
    assert attempt(prefix, workdir)[0] == 0


def test_another_batch_size_goes_on_after_the_samples_that_were_consumed(workdir, prefix):
    for size, steps in ((2, 6), (16, 8)):
        status, said = attempt(
            prefix, workdir, data__global_batch_size=size, run__steps=steps, run__accept_changes=True
        )
        assert status == 0, said
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["consumed_samples"] for r in rows] == [4, 8, 12, 16, 18, 20, 36, 52]
    assert all(r["consumed_tokens"] == 16 * r["consumed_samples"] for r in rows)


def test_another_number_of_threads_is_another_arithmetic(workdir, prefix):
    import torch

    status, said = attempt(prefix, workdir, run__threads=3)
    assert status == 2 and "--run.threads: was 0, now 3" in said
    path, threads = workdir / "checkpoints" / "4" / "meta" / "metadata", torch.get_num_threads()
    meta = json.loads(path.read_text())
    assert meta["arithmetic"]["threads"] >= 1
    status, said = attempt(prefix, workdir, run__threads=3, run__accept_changes=True)
    assert status == 0 and "the last digits of the numbers will differ" in said and "3 now" in said
    torch.set_num_threads(threads)


@pytest.mark.parametrize("lr", [1e38, 1e30])
def test_a_run_that_is_ruined_stops_with_its_own_status_and_keeps_the_good_checkpoints(lr, workdir, prefix):
    before = picture(workdir / "checkpoints")
    status, said = attempt(
        prefix, workdir, optim__lr=lr, run__steps=40, run__stop_after_skipped=5, run__accept_changes=True
    )
    assert status == 4 and f"the last good checkpoint is {workdir / 'checkpoints' / '4'}" in said, said
    assert "Traceback" not in said
    kept = picture(workdir / "checkpoints")
    assert {k: v for k, v in kept.items() if k.startswith("4")} == {
        k: v for k, v in before.items() if k.startswith("4")
    }
    text = (workdir / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and '"nonfinite": {"grad_norm": "nan"}' in text
    assert attempt(prefix, workdir, run__accept_changes=True)[0] == 0


def test_a_run_that_begins_anew_beside_old_logs_keeps_them(workdir, prefix):
    old = [(workdir / name).read_text() for name in ("metrics.jsonl", "train.log")]
    shutil.rmtree(workdir / "checkpoints")
    status, said = attempt(prefix, workdir)
    assert status == 0 and "metrics.1.jsonl" in said
    assert [(workdir / name).read_text() for name in ("metrics.1.jsonl", "train.1.log")] == old
    assert iterations(workdir) == [1, 2, 3, 4]


def test_a_second_run_in_a_work_folder_is_refused_and_the_first_goes_on(prefix, tmp_path):
    command_line = [sys.executable, "train.py", *flags(prefix, tmp_path, "--run.steps=2000")]
    first = subprocess.Popen(command_line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoints" / "8").is_dir():
        assert first.poll() is None
        time.sleep(0.05)
    status, said = attempt(prefix, tmp_path, run__steps=2000)
    assert status == 2 and f"is in use by process {first.pid}" in said and "Traceback" not in said
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 0
    rows = iterations(tmp_path)
    assert rows == list(range(1, len(rows) + 1))


def test_a_run_outside_of_the_main_thread_says_that_signals_are_not_handled(prefix, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(attempt(prefix, tmp_path)))
    thread.start()
    thread.join()
    assert results[0][0] == 0 and "not in the main thread" in results[0][1]


def test_what_is_asked_for_and_not_given_is_said(workdir, prefix):
    status, said = attempt(prefix, workdir, run__steps=6, run__profile_steps="2:3", run__accept_changes=True)
    assert status == 0 and "--run.profile_steps=2:3 lies before iteration 4" in said
    status, said = attempt(prefix, workdir, run__dump_ranks="0,1", run__dump_dir=str(workdir / "d"))
    assert status == 2 and "this run has ranks 0 to 0" in said


ENVIRONMENTS = {
    "empty_world_size": ({"WORLD_SIZE": ""}, [], 0, "done: 4"),
    "rank_alone": ({"RANK": "3"}, [], 2, "RANK=3 with WORLD_SIZE 1"),
    "world_size_alone": ({"WORLD_SIZE": "2"}, [], 2, "without RANK, MASTER_ADDR, MASTER_PORT"),
    "world_size_odd": ({"WORLD_SIZE": "two"}, [], 2, "WORLD_SIZE=two: a number"),
    "empty_cache_home": ({"XDG_CACHE_HOME": ""}, ["--run.backend=inductor"], 0, "done: 4"),
    "no_compiler": ({"CXX": "/nonexistent/g++"}, ["--run.backend=inductor"], 2, "/nonexistent/g++ (CXX) cannot be run"),
    "no_compiler_needed": ({"CXX": "/nonexistent/g++"}, [], 0, "done: 4"),
    "home_is_nowhere": ({"HOME": "/nonexistent", "XDG_CACHE_HOME": ""}, [], 0, "done: 4"),
    "one_compile_thread": ({"TORCHINDUCTOR_COMPILE_THREADS": "1"}, ["--run.backend=inductor"], 0, "done: 4"),
    "cache_is_a_file": ({"XDG_CACHE_HOME": "FILE"}, ["--run.backend=inductor"], 0, "compiled code is not kept in"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(name, prefix, tmp_path):
    environ, more, want, message = ENVIRONMENTS[name]
    (tmp_path / "file").touch()
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")} | {
        key: str(tmp_path / "file") if value == "FILE" else value for key, value in environ.items()
    }
    if environ.get("XDG_CACHE_HOME") == "":
        environ |= {"HOME": environ.get("HOME", str(tmp_path / "home"))}
    out = train(*flags(prefix, tmp_path / "run", *more), **environ)
    assert out.returncode == want and message in out.stderr and "Traceback" not in out.stderr, out.stderr
    if want == 2:
        assert not (tmp_path / "run").exists()


def test_a_user_without_a_name_or_a_home_trains(prefix, tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    script = "import os, sys; os.setgid(54321); os.setuid(54321); os.execv(sys.argv[1], sys.argv[1:])"
    tmp_path.chmod(0o777)
    for folder in (*tmp_path.parents, prefix.parent):
        folder.chmod(folder.stat().st_mode | 0o5) if folder.stat().st_uid == 0 and str(folder) != "/" else None
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")}
    arguments = [sys.executable, "train.py", *flags(prefix, tmp_path / "run", "--run.backend=inductor")]
    probe = [sys.executable, "-c", script, sys.executable, "-c", "import torch"]
    if subprocess.run(probe, cwd=ROOT, env=env, capture_output=True).returncode:
        pytest.skip("the project's environment cannot be read by another user; it can where it does not lie in /root")
    out = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0 and "this user has no home folder" in out.stderr, out.stderr


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
