"""What a run shows on a terminal: what it is at, then a bar; nothing of that where standard error is a file."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--flagfile=configs/tiny_cpu.flags", "--model.num_layers=1", "--model.embed_dim=32", "--model.num_heads=2",
    "--model.num_kv_heads=2", "--model.mlp_dim=48", "--model.vocab_size=400", "--data.seq_len=32", "--run.steps=3",
    "--run.eval_every=2", "--run.backend=eager", "--data.path=llama_fn/tools",
]  # fmt: skip


def on_a_terminal(*flags):
    """Exit status, and all that was written to a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, stderr=theirs, stdout=theirs, env=env)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    return process.wait(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


def test_every_part_of_a_start_is_named_while_it_goes_on(tmp_path):
    flags = [*FLAGS, f"--run.workdir={tmp_path}"]
    status, said = on_a_terminal(*flags)
    assert status == 0, said
    for words in ("finding, tokenizing and ordering the data", "compiling with eager",
                  "drawing the first parameters", "step 3/3"):  # fmt: skip
        assert words in said, said
    status, said = on_a_terminal(*flags, "--run.steps=4", "--run.accept_changes")
    assert status == 0 and "restoring iteration 3" in said, said
