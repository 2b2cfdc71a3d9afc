"""Jumps of the loss: which numbers are one, and runs that go back from them, against runs that never met them."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llama_fn.compiler import ir
from llama_fn.compiler.backends import eager
from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig
from llama_fn.data import skips
from llama_fn.errors import UserError
from llama_fn.operations import attempts, facts, report
from llama_fn.run import health, loop, records
from llama_fn.run.spikes import FEWEST, Spikes

CHANCE = random.Random(0)
STEPS, EVERY = 60, 10


def curve(steps, noise=0.05):
    """A loss that falls as losses do, with the noise of batches."""
    return [2 + 6 * math.exp(-i / 40) + CHANCE.gauss(0, noise) for i in range(steps)]


def seen(losses, action="skip"):
    spikes = Spikes(action, 8.0)
    found = [i for i, loss in enumerate(losses) if spikes.observe(i, loss, 10 * i) is not None]
    return found, spikes


def test_a_falling_noisy_loss_has_no_spikes():
    for _ in range(20):
        assert seen(curve(400))[0] == []


@pytest.mark.parametrize("size", [2.0, 3.0, 30.0])
def test_a_jump_is_one_and_says_by_how_much(size):
    losses = curve(400)
    losses[350] += size
    found, spikes = seen(losses)
    assert found[0] == 350 and spikes.found is not None
    assert spikes.found.consumed == 3500 and spikes.found.loss - spikes.found.usual == pytest.approx(size, abs=0.4)
    assert "iteration 350: the loss jumped to" in str(spikes.found)


def test_neither_few_losses_nor_one_that_is_not_finite_nor_a_smooth_curve_make_one():
    assert seen([2.0] * (FEWEST - 1) + [50.0])[0] == []
    assert seen([2.0] * FEWEST + [math.nan, math.inf])[0] == []
    assert seen([2.0] * 100 + [2.01] * 5)[0] == [], "half a percent is no jump, however smooth the curve was"
    assert seen([2.0] * FEWEST + [2.1])[0] == [FEWEST]
    off = Spikes("skip", 0.0)
    assert all(off.observe(i, loss, 0) is None for i, loss in enumerate([2.0] * 100 + [90.0]))
    assert seen([0.0] * 100 + [7.0] * 10)[0] == [], "batches whose tokens are all masked"


def test_a_warning_is_said_once_for_a_jump_that_lasts(caplog):
    losses = curve(300)
    losses[200:210] = [9.0] * 10
    found, spikes = seen(losses, "warn")
    assert found == [200] and len(caplog.records) == 1 and spikes.found is None


def test_what_is_passed_over_joins_what_the_flag_names(tmp_path):
    cfg = Config(data=DataConfig(skip="100:200,500:600"))
    assert skips.with_kept(cfg, tmp_path).data.skip == "100:200,500:600"
    skips.keep(tmp_path, 150, 250)
    skips.keep(tmp_path, 700, 800)
    assert skips.with_kept(cfg, tmp_path).data.skip == "100:250,500:600,700:800"
    (tmp_path / skips.FILE).write_text("[[1")
    with pytest.raises(UserError, match=r"skips\.json is damaged .* from the spikes in events\.jsonl"):
        skips.with_kept(cfg, tmp_path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("argparse.py", "ast.py", "bdb.py", "cmd.py"):
        shutil.copy(Path(os.__file__).parent / name, folder)
    return folder


def config(corpus, workdir, steps=STEPS, **run):
    model = ModelConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, mlp_dim=16, vocab_size=400)
    return Config(
        model=model, data=DataConfig(path=str(corpus), seq_len=32, global_batch_size=4, split="1,0,0"),
        run=RunConfig(
            workdir=str(workdir), backend="eager", steps=steps, checkpoint_every=EVERY, eval_every=0, log_every=1,
            tensorboard=False, **run,
        ),
    )  # fmt: skip


def poisoned(at, times):
    """A backend whose loss jumps for the batch that iteration `at` has first: as often as `times` says."""
    met, left, calls = [], [times], [0]

    def compile(program, **options):
        made = eager.compile(program, **options)
        graph = program.graphs[0].graph
        tokens = [node.meta["path"] for node in ir.placeholders(graph)].index("batch.tokens")
        loss = [path for path in ir.output_node(graph).meta["paths"] if not path.startswith("state")]
        loss = next(i for i, path in enumerate(loss) if path.endswith("lm_loss"))

        def run(inputs):
            calls[0] += 1
            batch, results = inputs[tokens].clone(), list(made.run(inputs))
            if calls[0] == at:
                met.append(batch)
            if met and batch.equal(met[0]) and left[0]:
                left[0] -= 1
                results[loss] = results[loss] + 10
            return results

        return replace(made, run=run)

    return compile


def losses(workdir):
    return [(row["iteration"], row["lm_loss"], row["consumed_samples"]) for row in records.read(workdir)]


def spikes_of(workdir):
    return [each for attempt in attempts.read(workdir) for each in attempt.spikes]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert loop.run(config(corpus, workdir)) == 0
    return losses(workdir)


def test_a_run_goes_back_and_passes_over_the_samples_as_the_flag_would(corpus, undisturbed, tmp_path):
    assert loop.run(config(corpus, tmp_path / "run", on_spike="skip"), backend=poisoned(47, 9)) == 0
    (spike,) = spikes_of(tmp_path / "run")
    assert (spike["iteration"], spike["back_to"], spike["from"], spike["to"]) == (47, 40, 160, 188)
    cfg = config(corpus, tmp_path / "known")
    assert loop.run(replace(cfg, data=replace(cfg.data, skip="160:188"))) == 0
    found = losses(tmp_path / "run")
    assert found == losses(tmp_path / "known"), "bitwise, no iteration lost or doubled"
    assert found[:40] == undisturbed[:40] and found[40:] != undisturbed[40:]
    (attempt,) = attempts.read(tmp_path / "run")
    assert attempt.done_again == 7 and attempts.goodput([attempt]).seconds["lost"] > 0


def test_what_was_passed_over_stays_so_in_later_starts(corpus, tmp_path):
    backend = poisoned(47, 9)
    assert loop.run(config(corpus, tmp_path / "run", 55, on_spike="skip"), backend=backend) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "50")  # as if killed before it was saved
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "55")
    before = losses(tmp_path / "run")
    assert loop.run(config(corpus, tmp_path / "run", 55, on_spike="skip"), backend=backend) == 0
    assert losses(tmp_path / "run") == before and len(spikes_of(tmp_path / "run")) == 1


def test_a_machine_that_computed_wrong_is_told_from_data(corpus, undisturbed, tmp_path, capfd):
    assert loop.run(config(corpus, tmp_path / "run", on_spike="roll_back"), backend=poisoned(47, 1)) == 0
    assert losses(tmp_path / "run") == undisturbed
    assert "the jump of the loss at iteration 47 did not come again" in capfd.readouterr().err
    assert loop.run(config(corpus, tmp_path / "data", on_spike="roll_back"), backend=poisoned(47, 9)) == health.STATUS
    said = capfd.readouterr().err
    assert "iteration 47" in said and "bit for bit: it is the data or the numbers" in said
    assert sorted(p.name for p in (tmp_path / "data" / "checkpoints").iterdir() if p.name.isdigit())[-1] == "40"


def test_a_spike_in_the_last_iteration_is_not_saved(corpus, tmp_path):
    assert loop.run(config(corpus, tmp_path / "run", 50, on_spike="skip"), backend=poisoned(50, 9)) == 0
    (spike,) = spikes_of(tmp_path / "run")
    assert (spike["iteration"], spike["back_to"]) == (50, 40)
    assert losses(tmp_path / "run")[-1][2] == 50 * 4 + 40


def test_by_default_a_jump_is_said_and_training_goes_on(corpus, undisturbed, tmp_path, capfd):
    assert loop.run(config(corpus, tmp_path / "run"), backend=poisoned(47, 1)) == 0
    found = losses(tmp_path / "run")
    assert [each for each in found if each[0] != 47] == [each for each in undisturbed if each[0] != 47]
    assert capfd.readouterr().err.count("the loss jumped to") == 1
    (spike,) = spikes_of(tmp_path / "run")
    assert spike["action"] == "warn" and "back_to" not in spike
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("training") == 1


def test_the_report_lists_it(corpus, tmp_path):
    assert loop.run(config(corpus, tmp_path / "run", on_spike="skip"), backend=poisoned(47, 9)) == 0
    page = report.as_html([facts.gather(tmp_path / "run")])
    assert "samples passed over" in page and "160 to 188" in page
