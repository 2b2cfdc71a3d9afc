"""Small runs for the tests of this folder: in this process, or by train.py in another one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from llama_fn.config import Config
from llama_fn.config_fields import with_values
from llama_fn.run import events, loop, workdir_lock
from llama_fn.tools import command

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "model.num_layers": 1, "model.embed_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 2, "model.mlp_dim": 48,
    "model.vocab_size": 64, "data.seq_len": 16, "data.global_batch_size": 4, "run.steps": 4, "run.checkpoint_every": 2,
    "run.eval_every": 0, "run.backend": "eager", "run.tensorboard": False,
}  # fmt: skip


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
        # A start that is refused is an event of its own.
        if (path.is_file() or path.is_symlink()) and path.name not in (workdir_lock.FILE, "verified.json", events.FILE)
    }


def iterations(workdir):
    return [json.loads(line)["iteration"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
