"""Launch scripts and manifests: what they would run, and when SLURM starts a run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llama_fn.config import Config
from llama_fn.config_fields import flat

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "configs" / "launch"
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=1 exec "$@"
"""
TORCHRUN = """#!/bin/bash
echo "$@" > "$STAND_IN/torchrun"
mkdir -p "$WORKDIR"
exec 3>> "$WORKDIR/events.jsonl"
echo '{"time": 1, "event": "start", "pid": 1, "host": "a", "steps": 9}' >&3
[ -n "$END" ] && echo '{"time": 2, "event": "end", "why": "so", "status": '"$END}" >&3
exit $([ "$END" = 0 ] && echo 0 || echo 1)
"""


def known(flag):
    """Whether train.py has it."""
    return flag.startswith("--flagfile=") or flag.removeprefix("--").partition("=")[0] in flat(Config())


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sbatch"), *(ROOT / "configs").glob("*.sh")], ids=lambda p: p.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("end", "requeued", "status"), [("0", False, 0), ("5", True, 0), ("", True, 0), ("4", False, 1), ("2", False, 1)]
)
def test_slurm_starts_again_what_a_start_again_mends(end, requeued, status, tmp_path):
    (tmp_path / "bin").mkdir()
    scontrol = f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol\n[ "$1" = show ] && printf "n1\\nn2\\n"\nexit 0\n'
    for name, text in (("srun", SRUN), ("torchrun", TORCHRUN), ("scontrol", scontrol)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "STAND_IN": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "llama", "FLAGFILE": "configs/tiny_cpu.flags", "WORKDIR": str(tmp_path / "work dir"),
        "END": end,
    }  # fmt: skip
    script = str(LAUNCH / "slurm.sbatch")
    done = subprocess.run(["bash", script], env={**os.environ, **given}, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    words = (tmp_path / "torchrun").read_text().split()
    for word in ("--nnodes=2", "--node_rank=1", "--nproc_per_node=8", "--master_addr=n1", "--run.grace_s=600"):
        assert word in words, words
    assert ("requeue 77" in (tmp_path / "scontrol").read_text()) == requeued


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda p: p.name)
def test_manifests_ask_for_what_their_flags_train_on(path):
    text = path.read_text()
    job = yaml.safe_load(text)
    assert job["apiVersion"] in ("kubeflow.org/v1", "batch.volcano.sh/v1alpha1") and job["metadata"]["name"]
    flags = [word.strip("\"'") for word in text.split() if word.startswith("--") and not word.startswith("--signals")]
    assert len(flags) >= 2 and all(known(flag) for flag in flags), flags
    (flagfile,) = {word for word in text.split() if word.startswith(("configs/llama", "--flagfile="))}
    mesh = next(
        line for line in (ROOT / flagfile.removeprefix("--flagfile=")).read_text().splitlines() if "mesh.axes" in line
    )
    devices = 1
    for axis in mesh.partition("=")[2].split(","):
        devices *= int(axis.partition(":")[2])
    replicas = json.dumps(job).count('"replicas": 4')
    assert devices == 32 == replicas * 4 * 8, "four machines of eight"
    pods = [*_pods(job)]
    assert pods and all(pod["terminationGracePeriodSeconds"] >= 600 for pod in pods), "longer than a save may take"


def _pods(node):
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from _pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from _pods(value)
