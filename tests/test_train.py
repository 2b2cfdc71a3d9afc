"""train.py as a user runs it: flags, errors, stopping, killing and resuming."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import event_accumulator

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--flagfile=configs/tiny_cpu.flags", "--model.num_layers=2", "--model.embed_dim=32", "--model.num_heads=2",
    "--model.num_kv_heads=2", "--model.mlp_dim=48", "--model.vocab_size=400", "--data.seq_len=32",
    "--run.steps=40", "--run.checkpoint_every=8", "--run.eval_every=16", "--run.backend=eager",
    "--data.split=8,2,0",
]  # fmt: skip
MEGATRON = re.compile(
    r" iteration +(\d+)/ +\d+ \| consumed samples: +(\d+) \| consumed tokens: +\d+ \|"
    r" elapsed time per iteration \(ms\): [\d.]+ \| learning rate: (\S+) \| global batch size: +\d+ \|"
    r" lm loss: (\S+) \| loss scale: [\d.]+ \| grad norm: [\d.]+ \| actual seqlen: +\d+ \|"
    r" number of skipped iterations: +\d+ \| number of nan iterations: +\d+ \|"
    r" samples per second: [\d.]+ \| TFLOPs: [\d.]+ \|"
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("the right to mount a file system is missing; runs as root on Linux")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small folder of Python sources, so that tests do not tokenize the whole library."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("argparse.py", "ast.py", "bdb.py", "cmd.py", "csv.py", "glob.py", "heapq.py", "json/decoder.py"):
        source = Path(os.__file__).parent / name
        (folder / name.replace("/", "_")).write_bytes(source.read_bytes())
    return folder


def start(*flags):
    command = [sys.executable, "train.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*flags):
    process = start(*flags)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def rows(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir):
    return [(r["iteration"], r["lm_loss"], r["grad_norm"]) for r in rows(workdir)]


def logged(workdir):
    """train.log but for the times in it."""
    lines = (Path(workdir) / "train.log").read_text().splitlines()
    return [re.sub(r"(\(ms\)|per second|TFLOPs): [\d.]+", "", line) for line in lines]


def wait_for_rows(workdir, n, process):
    path = Path(workdir) / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < n:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("a")
    code, out = run(*SMALL, f"--data.path={corpus}", f"--run.workdir={workdir}")
    assert code == 0, out
    return workdir


def test_a_run_leaves_metrics_logs_flags_and_checkpoints(uninterrupted):
    table = rows(uninterrupted)
    assert [r["iteration"] for r in table] == list(range(1, 41))
    assert set(table[0]) == {
        "iteration", "consumed_samples", "consumed_tokens", "lm_loss", "learning_rate", "grad_norm", "loss_scale",
        "skipped_iterations", "nan_iterations", "step_time_ms", "data_wait_ms", "tokens_per_second",
        "tflops_hardware", "mfu", "nonfinite_params", "nonfinite", "global_batch_size",
    }  # fmt: skip
    assert table[-1]["consumed_tokens"] == 40 * 8 * 32 and table[-1]["mfu"] is None
    assert table[-1]["lm_loss"] < table[0]["lm_loss"]
    lines = (uninterrupted / "train.log").read_text().splitlines()
    matched = [m for m in map(MEGATRON.fullmatch, lines) if m]
    assert len(matched) == 40 and f"{table[2]['lm_loss']:.6E}" == matched[2][4]
    validated = [row for row in table if "validation_loss" in row]
    said = [line for line in lines if "validation loss" in line]
    assert [row["iteration"] for row in validated] == [16, 32] and len(said) == 2
    assert f"lm loss value: {validated[1]['validation_loss']:.6E}" in said[1]
    assert all(0 <= row["data_wait_ms"] <= row["step_time_ms"] for row in table)
    assert sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir()) == [32, 40]
    assert "--data.seq_len=32" in (uninterrupted / "flags.txt").read_text()
    assert (uninterrupted / "summary.md").read_text().startswith(f"# {uninterrupted.name}: finished\n")
    assert "<svg" in (uninterrupted / "report.html").read_text()
    assert json.loads((uninterrupted / "config.json").read_text())["versions"]["torch"].startswith("2.13.0")


def test_tensorboard_has_both_losses_in_one_chart_and_says_what_was_run(uninterrupted):
    def events(folder):
        held = event_accumulator.EventAccumulator(str(folder)).Reload()
        return held, {tag: [event.value for event in held.Scalars(tag)] for tag in held.Tags()["scalars"]}

    table = rows(uninterrupted)
    held, train = events(uninterrupted / "tensorboard")
    _, validation = events(uninterrupted / "tensorboard" / "validation")
    assert train["loss/lm_loss"] == pytest.approx([row["lm_loss"] for row in table])
    assert validation == {
        "loss/lm_loss": pytest.approx([r["validation_loss"] for r in table if "validation_loss" in r])
    }
    assert {tag.split("/")[0] for tag in train} == {"loss", "optimizer", "speed", "totals"}
    texts = {tag: held.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in held.Tags()["tensors"]}
    assert "train.py --flagfile" in texts["run/command/text_summary"] or "train.py" in texts["run/command/text_summary"]
    assert (
        '"torch": "2.13.0' in texts["run/versions/text_summary"] and "data.seq_len" in texts["run/config/text_summary"]
    )


@pytest.mark.parametrize("kill_at", [11, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 21))])
def test_killed_and_resumed_equals_uninterrupted_bitwise(kill_at, uninterrupted, corpus, tmp_path):
    """And texts that the model writes in between change nothing; each stands in the log once."""
    flags = [*SMALL, f"--data.path={corpus}", f"--run.workdir={tmp_path}", "--run.sample_every=5"]
    process = start(*flags)
    wait_for_rows(tmp_path, kill_at, process)
    process.kill()
    process.communicate()
    code, out = run(*flags)
    assert code == 0, out
    assert numbers(tmp_path) == numbers(uninterrupted)
    log = logged(tmp_path)
    said = [line.split(" | ")[0] for line in log if line.startswith(" sample")]
    assert said == [f" sample at iteration {i}" for i in range(5, 41, 5) for _ in range(3)]
    assert [line for line in log if not line.startswith(" sample")] == logged(uninterrupted)


@pytest.mark.slow
def test_a_mixture_goes_on_where_it_was_killed_and_validates_each_source(corpus, tmp_path):
    lines = [
        f"  - {{name: {name}, path: {corpus / file}, weight: {weight}}}"
        for name, file, weight in (("one", "argparse.py", 3), ("two", "ast.py", 1.5), ("three", "cmd.py", 0.5))
    ]
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("\n".join(["sources:", *lines]))
    flags = [*SMALL, f"--data.path={mixture}", "--data.split=1,1,0", "--run.steps=20"]
    whole, killed = ([*flags, f"--run.workdir={tmp_path / name}"] for name in ("whole", "killed"))
    for name in ("argparse.py", "ast.py", "cmd.py"):  # several documents of each
        text = (corpus / name).read_text().splitlines(keepends=True)
        folder = tmp_path / name
        folder.mkdir()
        for i in range(0, len(text), 40):
            (folder / f"{i:05d}.txt").write_text("".join(text[i : i + 40]))
    mixture.write_text(mixture.read_text().replace(str(corpus), str(tmp_path)))
    code, out = run(*whole)
    assert code == 0 and "mixture of 3 sources, 160 samples" in out, out
    process = start(*killed)
    wait_for_rows(tmp_path / "killed", 11, process)
    process.kill()
    process.communicate()
    code, out = run(*killed)
    assert code == 0, out
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    said = [line for line in logged(tmp_path / "whole") if "validation" in line]
    named = [re.match(r" validation loss at iteration 16 \|( \w+ \|)? lm loss value: (\S+) ", line) for line in said]
    assert [m[1] for m in named] == [None, " one |", " two |", " three |"]
    assert float(named[0][2]) == pytest.approx(sum(float(m[2]) for m in named[1:]) / 3, rel=1e-6)
    mixture.write_text(mixture.read_text().replace("weight: 0.5", "weight: 0.6"))
    code, out = run(*killed)
    assert code == 2 and "weight 0.6" in out, out


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_signals_save_say_where_and_exit(number, uninterrupted, corpus, tmp_path):
    flags = [*SMALL, f"--data.path={corpus}", f"--run.workdir={tmp_path}"]
    process = start(*flags)
    wait_for_rows(tmp_path, 5, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 5, out
    at = int(re.search(r"saved iteration (\d+) in (\S+);", out)[1])
    assert (tmp_path / "checkpoints" / str(at)).is_dir()
    code, out = run(*flags)
    assert code == 0 and f"resuming from iteration {at}" in out
    assert numbers(tmp_path) == numbers(uninterrupted)


def test_a_resume_with_other_numbers_is_refused_with_the_difference(uninterrupted, corpus):
    code, out = run(*SMALL, f"--data.path={corpus}", f"--run.workdir={uninterrupted}", "--optim.lr=0.5")
    assert code == 2 and "--optim.lr: was 0.002, now 0.5" in out and "Traceback" not in out


def test_the_megatron_line_of_the_published_slice():
    """TFLOPs 107.09 and 7.570 samples/s for the 65B slice at 33.818 s on 8 devices; consumed counts of iteration 3."""
    from dataclasses import replace

    from llama_fn.config import Config
    from llama_fn.model.presets import preset
    from llama_fn.run import metrics

    cfg = Config(model=preset("llama_65b_8layers"))
    cfg = replace(cfg, data=replace(cfg.data, seq_len=2048, global_batch_size=256), run=replace(cfg.run, steps=50000))
    values = {"lm_loss": 1.0, "learning_rate": 1.40625e-07, "grad_norm": 1.0, "loss_scale": 1.0}
    values |= {"skipped_iterations": 0, "nan_iterations": 0, "nonfinite_params": 0}
    consumed = {"consumed_samples": 768, "consumed_tokens": 1572864, "global_batch_size": 256}
    row = metrics.record(cfg, 3, values, 33.818, 0.0, None, consumed)
    assert row["tflops_hardware"] / 8 * 4 / 3 == pytest.approx(107.09, abs=0.01)  # full recompute: 4 instead of 3
    text = metrics.line(cfg, row)
    assert "consumed samples:          768 | consumed tokens:      1572864 |" in text
    assert "learning rate: 1.406E-07" in text and "samples per second: 7.570" in text
    assert MEGATRON.fullmatch(text)


@pytest.mark.slow
def test_a_full_file_system_ends_the_run_and_loses_nothing(small_disk, corpus):
    flags = [*SMALL, f"--data.path={corpus}", f"--run.workdir={small_disk}", "--run.checkpoint_every=2"]
    filler = small_disk / "filler"
    process = start(*flags)
    while not (small_disk / "checkpoints" / "4").is_dir() and process.poll() is None:
        time.sleep(0.01)
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
        while f.write(bytes(4096)):
            pass
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 2, out
    last = out.splitlines()[-1]  # tensorstore's threads may have printed tracebacks before it
    assert last.startswith("error: ") and "No space left" in last and "start the same command again" in last, out[
        -2000:
    ]
    filler.unlink()
    status, out = run(*flags)
    assert status == 0 and "resuming from iteration" in out, out[-2000:]
    assert [row["iteration"] for row in rows(small_disk)] == list(range(1, 41))
