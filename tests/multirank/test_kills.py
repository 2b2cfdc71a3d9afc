"""kill -9 at any moment, mostly during saves: the next start goes on from a whole checkpoint, with right numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--flagfile=configs/tiny_cpu.flags", "--model.num_layers=2", "--model.embed_dim=32", "--model.num_heads=2",
    "--model.num_kv_heads=2", "--model.mlp_dim=48", "--model.vocab_size=400", "--data.seq_len=32", "--data.split=1,0,0",
    "--data.global_batch_size=4", "--run.checkpoint_every=1", "--run.backend=eager", "--mesh.axes=data:2",
    "--mesh.rules=fsdp", "--run.eval_every=0", "--run.tensorboard=false", "--run.log_every=1",
]  # fmt: skip


def kill_all(workdir):
    """The launcher and its processes, which are no group, at once."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and f"--run.workdir={workdir}" in (process / "cmdline").read_text().split("\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, UnicodeDecodeError):  # it is gone, or another's
            continue


def corpus(folder):
    made = folder / "corpus"
    made.mkdir()
    for name in ("argparse.py", "ast.py", "bdb.py", "cmd.py"):
        shutil.copy(Path(os.__file__).parent / name, made)
    return made


def rows(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [int(os.environ.get("LLAMA_FN_KILLS", "8"))])
def test_two_processes_killed_at_random_lose_and_change_nothing(kills, tmp_path):
    """Every iteration is saved, so that a run spends most of its time saving."""
    chance = random.Random(0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    flags = [*FLAGS, f"--data.path={corpus(tmp_path)}", f"--run.steps={40 * kills}"]

    def start(workdir, *more):
        command = [*launcher, *flags, f"--run.workdir={workdir}", *more]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    resumed = []
    for _ in range(kills):
        run, seen = start(tmp_path / "run"), len(rows(tmp_path / "run"))
        while len(rows(tmp_path / "run")) < seen + 3 and run.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.random())
        kill_all(str(tmp_path / "run"))
        said, _ = run.communicate()
        resumed += [line for line in said.splitlines() if "resuming from iteration" in line]
        assert "damaged" not in said and "Traceback" not in said, said[-3000:]
    end = len(rows(tmp_path / "run")) + 10
    last = start(tmp_path / "run", f"--run.stop_at={end}")
    said, _ = last.communicate(timeout=1800)
    assert f"stopped behind iteration {end}" in said and len(resumed) >= kills - 1, said[-3000:]
    start(tmp_path / "alone", f"--run.stop_at={end}").communicate(timeout=1800)
    want, got = rows(tmp_path / "alone"), rows(tmp_path / "run")
    assert [row["iteration"] for row in got] == list(range(1, end + 1))
    assert [row["lm_loss"] for row in got] == [row["lm_loss"] for row in want], "bitwise, whatever was killed"
    print(f"{kills} kills, {len(resumed)} starts that resumed, {end} iterations")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [int(os.environ.get("LLAMA_FN_LONE_KILLS", "40"))])
def test_one_process_killed_at_random_in_any_phase_loses_doubles_and_changes_no_line(kills, tmp_path):
    """Preparing data, compiling, restoring, training, validating and saving."""
    flags = [
        *(flag for flag in FLAGS if not flag.startswith(("--mesh", "--run.checkpoint", "--run.eval", "--data.split"))),
        "--data.split=9,1,0", "--run.checkpoint_every=5", "--run.eval_every=7", "--run.eval_batches=2",
        "--run.steps=1000000", f"--data.path={corpus(tmp_path)}",
    ]  # fmt: skip
    work = tmp_path / "run"
    command = [sys.executable, str(Path(__file__).with_name("worker_kills.py")), str(kills), "0", str(work), "train.py"]
    done = subprocess.run(
        [*command, *flags, f"--run.workdir={work}"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    said = (tmp_path / "run.log").read_text()
    assert done.returncode == 0 and "Traceback" not in said and "damaged" not in said, done.stderr + said[-3000:]
    want, got = rows(tmp_path / "alone"), rows(work)
    last = int(done.stdout)
    assert [row["iteration"] for row in got] == [row["iteration"] for row in want] == list(range(1, last + 1))
    numbers = ("iteration", "lm_loss", "grad_norm", "validation_loss")
    assert [[row.get(name) for name in numbers] for row in got] == [[row.get(name) for name in numbers] for row in want]
    print(f"{kills} kills, {said.count('resuming from iteration')} starts that resumed, {last} iterations")
