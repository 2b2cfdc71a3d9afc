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


@pytest.mark.slow
@pytest.mark.parametrize("kills", [int(os.environ.get("LLAMA_FN_KILLS", "8"))])
def test_two_processes_killed_at_random_lose_and_change_nothing(kills, tmp_path):
    """Every iteration is saved, so that a run spends most of its time saving."""
    corpus, chance, steps = tmp_path / "corpus", random.Random(0), 40 * kills
    corpus.mkdir()
    for name in ("argparse.py", "ast.py", "bdb.py", "cmd.py"):
        shutil.copy(Path(os.__file__).parent / name, corpus)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    flags = [*FLAGS, f"--data.path={corpus}", f"--run.steps={steps}"]

    def start(workdir):
        command = [*launcher, *flags, f"--run.workdir={workdir}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def rows(workdir):
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

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
    last = start(tmp_path / "run")
    said, _ = last.communicate(timeout=1800)
    assert last.returncode == 0 and len(resumed) >= kills - 1, said[-3000:]
    start(tmp_path / "alone").communicate(timeout=1800)
    want, got = rows(tmp_path / "alone"), rows(tmp_path / "run")
    assert [row["iteration"] for row in got] == list(range(1, steps + 1))
    assert [row["lm_loss"] for row in got] == [row["lm_loss"] for row in want], "bitwise, whatever was killed"
