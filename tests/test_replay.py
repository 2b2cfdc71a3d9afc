"""An iteration trained again: the numbers that were logged, bit for bit on the same setting, and where a NaN began."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--model.num_layers=2", "--model.embed_dim=32", "--model.num_heads=2", "--model.num_kv_heads=2",
    "--model.mlp_dim=48", "--model.vocab_size=400", "--data.seq_len=32", "--data.global_batch_size=4",
    "--run.backend=eager", "--run.checkpoint_every=4", "--run.keep_latest=9", "--run.steps=10", "--run.eval_every=5",
    "--optim.warmup_steps=3", "--data.split=8,2,0",
]  # fmt: skip


def command(*words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def replay(workdir, *flags):
    return command("-m", "llama_fn.tools.replay", str(workdir), *flags)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(json.__file__).read_text()
    for i in range(8):
        (folder / f"{i}.txt").write_text(text[i * 1500 : i * 1500 + 1500])
    return folder


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "work"
    code, out = command("train.py", *SMALL, f"--data.path={corpus}", f"--run.workdir={folder}")
    assert code == 0, out
    return folder


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "replay_" not in str(p)}


def test_the_same_setting_gives_every_bit_again(workdir):
    before = files(workdir)
    code, out = replay(workdir, "--step=7")
    assert code == 0, out
    assert (
        "from iteration 4 to 7" in out
        and len(re.findall(r"^iteration [567]: lm_loss \S+ again; grad_norm \S+ again$", out, re.M)) == 3
    )
    assert files(workdir) == before, "the run itself is as it was"
    assert (workdir / "checkpoints/4").is_dir() and not (workdir / "replay_7/checkpoints/7").exists()


def test_another_mesh_gives_round_off_and_says_how_much(workdir):
    code, out = replay(workdir, "--step=6", "--mesh=data:2", "--backend=interpret")
    apart = [float(x) for x in re.findall(r"\(([\d.e-]+) of it\)", out)]
    assert code == 1 and apart and max(apart) < 1e-4, out


@pytest.mark.slow
def test_a_changed_log_is_seen(workdir, tmp_path):
    path = workdir / "metrics.jsonl"
    held = path.read_text()
    rows = [json.loads(line) for line in held.splitlines()]
    rows[2]["lm_loss"] += 1e-12
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out = replay(workdir, "--step=3", f"--out={tmp_path / 'again'}")
    path.write_text(held)
    assert code == 1 and out.count("now") == 1 and "from iteration 0 to 3" in out


@pytest.mark.slow
def test_a_number_that_is_not_finite_is_named_with_its_op_scope_and_line(corpus, tmp_path):
    """A learning rate beyond reason makes parameters of which a product overflows."""
    work = tmp_path / "work"
    flags = [*SMALL, f"--data.path={corpus}", f"--run.workdir={work}", "--optim.lr=1e30", "--run.stop_after_skipped=1"]
    code, out = command("train.py", *flags, "--optim.warmup_steps=0")
    assert code == 4, out
    bad = next(
        r["iteration"] for r in map(json.loads, (work / "metrics.jsonl").read_text().splitlines()) if r["nonfinite"]
    )
    code, out = replay(work, f"--step={bad}", "--check_finite")
    assert code == 1 and re.search(rf"in iteration {bad} llama_fn\.\w+\.\w+ in microbatch/0/.*, llama\.py:\d+", out), (
        out
    )


def test_wrong_words_are_told(workdir, tmp_path):
    for words, said in (([str(workdir)], "and --step"), ([str(tmp_path), "--step=3"], "name a run's work folder"),
                        ([str(workdir), "--step=11"], "none of the run's iterations, 1 to 10")):  # fmt: skip
        code, out = command("-m", "llama_fn.tools.replay", *words)
        assert code == 2 and said in out, out
