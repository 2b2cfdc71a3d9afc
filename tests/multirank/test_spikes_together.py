"""A text that is none, in two processes: both see the same jump of the loss and go back together."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
from test_kills import FLAGS, ROOT


@pytest.mark.slow
def test_two_processes_go_back_from_the_same_spike_and_pass_over_the_same_samples(tmp_path):
    corpus, chance = tmp_path / "corpus", random.Random(0)
    corpus.mkdir()
    for n in range(400):
        (corpus / f"{n:03}.txt").write_text("the quick brown fox jumps over the lazy dog and runs on\n" * 8)
    (corpus / "odd.txt").write_text("".join(chr(chance.randrange(0x4E00, 0x9FFF)) for _ in range(30)) + "\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    flags = [
        *FLAGS, f"--data.path={corpus}", "--run.steps=400", "--run.checkpoint_every=20", "--optim.lr=0.01",
        "--optim.warmup_steps=5", "--run.on_spike=skip", "--model.vocab_size=340",
    ]  # fmt: skip

    def run(name, *more):
        command = [*launcher, *flags, *more, f"--run.workdir={tmp_path / name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    found = run("run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    spikes = [event for event in events if event["event"] == "spike"]
    assert spikes and all(spike["loss"] > spike["usual"] for spike in spikes)
    over = json.loads((tmp_path / "run" / "skips.json").read_text())
    assert over == [[spike["from"], spike["to"]] for spike in spikes]
    known = run("known", "--data.skip=" + ",".join(f"{first}:{last}" for first, last in over))
    assert [row["lm_loss"] for row in found] == [row["lm_loss"] for row in known]
