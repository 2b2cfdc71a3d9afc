"""Batches that grow: Megatron's sizes at the same samples, the same samples in the same order, and runs that go on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from llama_fn.config import Config, DataConfig
from llama_fn.data import indexed, rampup, writer
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.samples import Samples
from llama_fn.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seed", range(20))
def test_sizes_are_megatrons(seed):
    draw = random.Random(seed)
    for _ in range(10):
        part, increments = draw.choice([1, 2, 3, 4]), draw.randint(1, 12)
        step, start = part * draw.randint(1, 4), part * draw.randint(1, 5)
        end, samples = start + increments * step, draw.randint(1, 3000)
        theirs = RampupBatchsizeNumMicroBatchesCalculator(end, part, 1, False, 1, start, step, samples)
        data = DataConfig(global_batch_size=end, microbatches=end // part, rampup=f"{start},{step},{samples}")
        ours, consumed, seen = rampup.of(data), 0, []
        for batches in range(1, 200):
            theirs.update(consumed, True)
            assert ours.size(consumed) == theirs.current_global_batch_size, (data, consumed)
            seen.append(ours.size(consumed))
            consumed += seen[-1]
            assert ours.reached(0, batches, ()) == consumed
        assert set(seen) <= set(ours.sizes(0)) and seen == sorted(seen)


def test_a_run_that_skips_reads_no_more_samples_than_it_said():
    ramp, skipped = rampup.Rampup(2, 2, 40, 8), [(5, 9), (60, 71)]
    consumed = 0
    for batches in range(1, 20):
        size = ramp.size(consumed)
        consumed = rampup.after(consumed, size, skipped) + size
        said = ramp.reached(0, batches, skipped)
        assert said == consumed if consumed > 71 else said >= consumed


def test_batches_grow_over_the_same_samples_and_a_resume_knows_their_size(tmp_path):
    writer.write(tmp_path / "x", [np.arange(50) + i for i in range(40)], np.uint16)
    samples = Samples(indexed.IndexedDataset(tmp_path / "x"), (0, 40), 8, 100, 1, "train")
    ramp = rampup.of(DataConfig(global_batch_size=8, microbatches=4, rampup="2,2,24"))

    def read(consumed, count):
        batches = BatchIterator(samples, 8, 4, 1000, consumed, rampup=ramp)
        seen = [(next(batches).tokens, batches.consumed) for _ in range(count)]
        batches.close()
        return seen

    whole = read(0, 10)
    assert [end for _, end in whole] == [2, 4, 6, 8, 12, 16, 22, 28, 36, 44]
    joined = np.concatenate([tokens.reshape(-1, 8).numpy() for tokens, _ in whole])
    assert np.array_equal(joined, np.stack([samples[k][:-1] for k in range(44)]))
    assert [tokens.shape[:2] for tokens, _ in (whole[0], whole[4], whole[-1])] == [(1, 2), (2, 2), (4, 2)]
    for i in range(9):
        rest = read(whole[i][1], 9 - i)
        assert all(a.equal(b) and m == n for (a, m), (b, n) in zip(rest, whole[i + 1 :], strict=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [("4,4", "is not START,STEP,SAMPLES"), ("4,0,10", "is not START"), ("8,4,10", "no way to"), ("3,4,9", "no way to"),
     ("1,1,10", "multiples of a microbatch, which has 2 samples"), ("a,b,c", "is not START")],
)  # fmt: skip
def test_what_is_no_ramp_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        rampup.of(DataConfig(global_batch_size=8, microbatches=4, rampup=text))


def test_each_size_still_to_come_is_compiled():
    cfg = Config(data=DataConfig(global_batch_size=8, microbatches=4, rampup="2,2,24"))
    assert [c.data.microbatches for c in rampup.configs(cfg, 0)] == [1, 2, 3]
    assert [c.data.microbatches for c in rampup.configs(cfg, 16)] == [3]
    assert not [*rampup.configs(cfg, 30)]


SMALL = [
    "--model.num_layers=1", "--model.embed_dim=32", "--model.num_heads=2", "--model.num_kv_heads=2",
    "--model.mlp_dim=48", "--model.vocab_size=400", "--data.seq_len=16", "--data.global_batch_size=8",
    "--data.microbatches=4", "--data.rampup=2,2,24", "--run.backend=eager", "--run.checkpoint_every=100",
    "--optim.schedule=constant", "--run.log_every=1",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_grows_its_batches_and_goes_on_bitwise(tmp_path):
    """Its first iteration is that of a run with batches of the first size."""
    text = Path(random.__file__).read_text()
    (tmp_path / "docs").mkdir()
    for i in range(20):
        (tmp_path / "docs" / f"{i:02}.txt").write_text(text[i * 1000 : i * 1000 + 1000])

    def run(name, *flags):
        given = [*SMALL, f"--data.path={tmp_path / 'docs'}", f"--run.workdir={tmp_path / name}", *flags]
        done = subprocess.run([sys.executable, "train.py", *given], cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(r["global_batch_size"], r["consumed_samples"], r["lm_loss"], r["grad_norm"]) for r in rows]

    whole = run("whole", "--run.steps=10")
    assert [row[0] for row in whole] == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    run("parts", "--run.steps=5")
    assert run("parts", "--run.steps=10", "--run.accept_changes") == whole
    small = run("small", "--run.steps=1", "--data.rampup=", "--data.global_batch_size=2", "--data.microbatches=1")
    assert small[0] == whole[0]
