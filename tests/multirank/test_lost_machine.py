"""A machine that is lost between two checkpoints costs the iterations since the last emergency copy, no more."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_kills import FLAGS, ROOT, kill_all

from llama_fn.data import writer


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir, corpus, machines):
    """One launcher for each machine, of one process each, with a folder of its own; their output."""
    port, logs = free_port(), []
    for number, folder in enumerate(machines):
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={number}"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={port}", "train.py"]
        flags = [*FLAGS, f"--data.path={corpus}", f"--run.workdir={workdir}", "--run.steps=40"]
        flags += ["--run.checkpoint_every=30", "--run.local_every=3", f"--run.local_dir={folder}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        logs.append(subprocess.Popen([sys.executable, *launcher, *flags], cwd=ROOT, **pipes))
    return logs


def losses(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["lm_loss"] for line in lines if line.endswith("}")]


@pytest.mark.slow
def test_a_lost_machine_costs_the_iterations_since_the_last_copy(tmp_path):
    corpus, machines = tmp_path / "corpus", [tmp_path / "one", tmp_path / "two"]
    chance = np.random.default_rng(0)
    # Not text, which two machines of one name would both be writing.
    writer.write(corpus, [chance.integers(0, 400, 500) for _ in range(40)], np.uint16)
    whole = [run.communicate(timeout=200)[0] for run in start(tmp_path / "whole", corpus, machines)]
    assert len(losses(tmp_path / "whole")) == 40, "\n".join(whole)
    assert not any(any(folder.iterdir()) for folder in machines), "nothing is left of a run that ended"

    runs = start(tmp_path / "run", corpus, machines)
    while not any(
        folder.name >= "6" for folder in machines[1].glob("*/*/1/sums.json") for folder in [folder.parents[1]]
    ):
        assert runs[0].poll() is None, runs[0].communicate()[0]
        time.sleep(0.01)
    kill_all(str(tmp_path / "run"))
    for run in runs:
        run.communicate()
    shutil.rmtree(machines[1])
    said = [run.communicate(timeout=200)[0] for run in start(tmp_path / "run", corpus, machines)]
    assert "of the local copies in" in said[0] and "Traceback" not in said[0] + said[1], "\n".join(said)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole"), "bitwise"


def test_a_folder_that_machines_share_is_refused(tmp_path):
    runs = start(tmp_path / "run", "README.md", [tmp_path / "both", tmp_path / "both"])
    said = [run.communicate(timeout=200)[0] for run in runs]
    assert runs[0].returncode and f"--run.local_dir={tmp_path / 'both'} is shared by machines" in said[0], "\n".join(
        said
    )
