"""What train.py says of wrong flags, and its help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import outcomes

ROOT = Path(__file__).resolve().parents[1]

WRONG = [
    (["--run.step=3"], "Did you mean run.steps?"),
    (["--model.preset=llama_7"], "Did you mean llama_7b?"),
    (["--data.global_batch_size=6", "--data.microbatches=4"], "not divisible by --data.microbatches=4"),
    (["--model.num_heads=3"], "--model.embed_dim=256 is not divisible by --model.num_heads=3"),
    (["--model.compute_dtype=int8"], "compute_dtype"),
    (["--run.steps=many"], "run.steps"),
    (["--data.path=/nowhere/at/all"], "no such file or folder"),
    (["--mesh.axes=data:2"], "torchrun --nproc_per_node=2"),
    (["--mesh.axes=data:3"], "data:3"),
    (["--mesh.rules=fsdq"], "Did you mean fsdp"),
    (["--mesh.axes=data=2"], "is not NAME:SIZE"),
    (["--run.device=cuda"], "finds no CUDA device"),
    (["--run.workdir=/proc/none"], "cannot be written"),
    (["stray"], "unexpected argument"),
    (["--flagfile=missing.flags"], "missing.flags"),
]


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory):
    """What becomes of each of WRONG, in a work folder of its own."""
    folders = [str(tmp_path_factory.mktemp("wrong")) for _ in WRONG]
    commands = [(str(ROOT), ["train.py", f"--run.workdir={f}", *w[0]]) for f, w in zip(folders, WRONG, strict=True)]
    return {str(flags): out for (flags, _), out in zip(WRONG, outcomes(commands), strict=True)}


@pytest.mark.parametrize("flags, message", WRONG, ids=lambda x: str(x)[:40])
def test_wrong_flags_get_one_paragraph_and_a_status(flags, message, outcome_of):
    import torch

    if flags == ["--run.device=cuda"] and torch.cuda.is_available():
        pytest.skip("a machine without a CUDA device is missing, which the message is for; runs where there is none")
    out = outcome_of[str(flags)]
    said = out.stdout + out.stderr
    assert out.returncode == 2 and message in said and "Traceback" not in said, said


def test_help_lists_every_flag():
    from llama_fn import config, config_fields

    first, second = (
        subprocess.run([sys.executable, "train.py", flag], cwd=ROOT, capture_output=True, text=True)
        for flag in ("--help", "-h")
    )
    out = first.stdout + first.stderr
    assert first.returncode == second.returncode == 0 and second.stdout + second.stderr == out
    for name in config_fields.flat(config.Config()):
        assert f"\n  --{name}=" in out, name
    for words in (
        "--optim.*  AdamW with",
        "llama2_70b",
        "80 layers, 8192 wide, 64 heads (8 of keys",
        "configs/tiny_cpu.flags",
    ):
        assert words in out, words
    assert max(map(len, out.splitlines())) <= 130


def test_a_reader_of_help_may_leave_early():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} train.py --help | head -n 2"], cwd=ROOT, capture_output=True
    )
    assert done.stdout.count(b"\n") == 2 and not done.stderr
