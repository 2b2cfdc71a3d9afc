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
    done = subprocess.run(
        ["bash", script, "--optim.lr=1e-4"], env={**os.environ, **given}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    words = (tmp_path / "torchrun").read_text().split()
    for word in ("--nnodes=2", "--node_rank=1", "--nproc_per_node=8", "--master_addr=n1", "--optim.lr=1e-4"):
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


def launch(*words, **environ):
    command = [sys.executable, "-m", "llama_fn.tools.launch", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environ})


RECIPE = ["--flagfile=configs/llama_65b_32npu.flags", "--run.workdir=/shared/work/a b"]
FURTHER = ["--optim.lr=1e-4", "--flagfile=configs/hyper/paper_65b.flags"]


@pytest.mark.parametrize("on", ["nodes", "slurm", "pytorchjob", "volcano"])
def test_a_dry_run_says_what_every_machine_would_run(on):
    done = launch(f"--on={on}", *RECIPE, *FURTHER, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a b: 32 processes, 8 on each of 4 machines\n") and "not there" not in done.stdout
    assert "'--run.workdir=/shared/work/a b'" in done.stdout
    assert "--optim.lr=1e-4 --flagfile=configs/hyper/paper_65b.flags" in done.stdout
    if "manifest" in done.stdout:
        job = yaml.safe_load(done.stdout.partition("manifest:\n")[2])
        assert job["metadata"]["name"] == "a-b"
        (container,) = next(iter(_pods(job)))["containers"]
        assert container["resources"]["limits"] == {"huawei.com/Ascend910": 8}
        assert all(part in " ".join(container["args"]) for part in ("/shared/work/a b", "--optim.lr=1e-4"))


def stand_in(folder, name):
    (folder / name).write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/{name}.words\n[ ! -t 0 ] && cat > {folder}/{name}.given\nexit 3\n'
    )
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_one_machine_gets_the_words_that_were_shown_and_gives_its_status(tmp_path):
    words = [
        "--flagfile=configs/tiny_cpu.flags",
        "--mesh.axes=data:2",
        "--devices=2",
        f"--run.workdir={tmp_path / 'a b'}",
    ]
    shown = launch(*words, "--dry_run").stdout
    assert "here:\n  bash configs/torchrun_one_node.sh 2 configs/tiny_cpu.flags" in shown
    done = launch(*words, **stand_in(tmp_path, "torchrun"))
    assert done.returncode == 3, done.stderr
    given = (tmp_path / "torchrun.words").read_text().splitlines()
    expected = [
        "--nproc_per_node=2",
        "train.py",
        "--flagfile=configs/tiny_cpu.flags",
        f"--run.workdir={tmp_path / 'a b'}",
    ]
    assert given[2:] == [*expected, "--mesh.axes=data:2"]


def test_slurm_gets_the_job_with_its_flags_and_kubernetes_the_manifest(tmp_path):
    assert launch("--on=slurm", *RECIPE, *FURTHER, **stand_in(tmp_path, "sbatch")).returncode == 3
    given = (tmp_path / "sbatch.words").read_text().splitlines()
    assert given[0] == "--nodes=4" and given[-3:] == ["configs/launch/slurm.sbatch", *FURTHER]
    assert "--export=ALL,FLAGFILE=configs/llama_65b_32npu.flags,WORKDIR=/shared/work/a b,DEVICES=8" in given
    assert launch("--on=volcano", *RECIPE, "--image=my/llama:1", **stand_in(tmp_path, "kubectl")).returncode == 3
    assert yaml.safe_load((tmp_path / "kubectl.given").read_text())["spec"]["minAvailable"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on=one", *RECIPE], "--on=one starts one machine, and the mesh takes 4 of 8"),
        (["--on=slurm", *RECIPE, "--devices=12"], "has 32 devices, no multiple of --devices=12"),
        (["--on=slurm"], "give --flagfile"),
        (["--on=nodes", *RECIPE], "needs --node_rank, 0 to 3, and --first_host"),
        (["--on=volcano", *RECIPE], "--image is needed"),
        (["--on=slurm", *RECIPE, "--run.stepz=3"], "--run.stepz is not a flag"),
        (["--on=slurm", *RECIPE, "--mesh.rules=fdsp"], "Did you mean fsdp"),
        (["--on=slurm", RECIPE[0], "--run.workdir=/a,b"], "sbatch divides at commas"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_is_said_before_anything_starts(words, said):
    done = launch(*words)
    assert done.returncode == 2 and said in done.stderr, done.stderr
