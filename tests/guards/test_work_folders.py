"""What damaged work folders, and folders of other runs, end in: a status, one paragraph, nothing moved."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from guard_runs import ROOT, attempt, flags, iterations, picture, train

from llama_fn.data import writer
from llama_fn.run import workdir_lock


def damage_meta(w):
    path = w / "checkpoints" / "4" / "meta" / "metadata"
    content = bytearray(path.read_bytes())
    content[content.index(b"consumed_samples") + 20] ^= 1
    path.write_bytes(content)


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def replaced(path, by):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    by(path)


# (what is done to the work folder, status of the next start, what it says, whether it may change anything)
FOLDERS = {
    "checkpoint_is_a_file": (lambda w: replaced(w / "checkpoints" / "4", Path.touch), 2, "4 is no folder"),
    "dangling_checkpoint": (
        lambda w: replaced(w / "checkpoints" / "4", lambda p: p.symlink_to("gone")), 2, "a link to gone, which is not"),
    "checkpoints_is_a_file": (lambda w: replaced(w / "checkpoints", Path.touch), 2, "cannot be read: File exists"),
    "workdir_is_a_file": (lambda w: replaced(w, Path.touch), 2, "is no folder"),
    "workdir_is_a_dangling_link": (lambda w: replaced(w, lambda p: p.symlink_to("gone")), 2, "is no folder"),
    "damaged_cannot_be_moved": (
        lambda w: (damage_meta(w), write(w / "damaged")), 2, "is damaged and cannot be moved"),
    "metrics_is_a_folder": (lambda w: replaced(w / "metrics.jsonl", Path.mkdir), 2, "metrics.jsonl: Is a directory"),
    "log_is_a_folder": (lambda w: replaced(w / "train.log", Path.mkdir), 2, "train.log: Is a directory"),
    "flags_is_a_folder": (lambda w: replaced(w / "flags.txt", Path.mkdir), 2, "flags.txt"),
    "lock_is_a_folder": (lambda w: replaced(w / "run.lock", Path.mkdir), 2, "run.lock: Is a directory"),
    "damaged_meta": (damage_meta, 0, "checkpoint .*4 is damaged .meta/metadata"),
    "missing_state": (lambda w: shutil.rmtree(w / "checkpoints" / "4" / "state"), 0, "4 is damaged .state/"),
    "no_list": (lambda w: (w / "checkpoints" / "4" / "sums.json").unlink(), 0, "resuming from iteration 4"),
    "orphan_of_a_killed_save": (
        lambda w: write(w / "checkpoints" / "6.orbax-checkpoint-tmp" / "x"), 0, "resuming from iteration 4"),
    "empty_lock": (lambda w: write(w / "run.lock"), 0, "resuming from iteration 4"),
    "garbage_in_lock": (lambda w: write(w / "run.lock", b"\xff{"), 0, "resuming from iteration 4"),
    "lock_of_a_dead_process": (
        lambda w: write(w / "run.lock", json.dumps({**workdir_lock._me(), "pid": 2**22 - 3}).encode()), 0, "resuming"),
    "damaged_tail_of_metrics": (
        lambda w: (w / "metrics.jsonl").open("ab").write(b'{"iteration": 1, "lm_loss": 4.1}\n\xff\xfe{"it'), 0,
        "line 5 is no record"),
    "garbage_in_verified": (lambda w: write(w / "data" / "verified.json", b"{"), 0, "resuming from iteration 4"),
    "metrics_are_gone": (lambda w: (w / "metrics.jsonl").unlink(), 0, "resuming from iteration 4"),
    "config_is_gone": (lambda w: (w / "config.json").unlink(), 0, "resuming from iteration 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_work_folders_are_told_or_healed(name, workdir, prefix):
    import re

    harm, want, message = FOLDERS[name]
    harm(workdir)
    before = picture(workdir.parent)
    status, said = attempt(prefix, workdir, run__steps=4)
    assert status == want and re.search(message, said) and "Traceback" not in said, said
    if status == 2:
        after = picture(workdir.parent)
        assert {k: v for k, v in after.items() if not k.endswith((".json", ".txt"))} == {
            k: v for k, v in before.items() if not k.endswith((".json", ".txt"))
        }, "nothing moved"
        assert said.count("error: ") == 1
    else:
        assert (workdir / "checkpoints" / "4").is_dir() and iterations(workdir)[-1:] in ([4], [])


def test_another_model_in_the_same_folder_moves_nothing_and_the_right_one_goes_on(workdir, prefix):
    before = picture(workdir)
    status, said = attempt(prefix, workdir, model__num_layers=2, run__accept_changes=True)
    assert status == 2 and "state.params.layers.wq: saved f32[1,32,2,16], needed f32[2,32,2,16]" in said
    assert picture(workdir) == before
    status, said = attempt(prefix, workdir, model__num_layers=2)
    assert status == 2 and "--model.num_layers: was 1, now 2" in said and picture(workdir) == before
    status, said = attempt(prefix, workdir, run__steps=6, run__accept_changes=True)
    assert status == 0 and "resuming from iteration 4" in said and iterations(workdir) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_permission_is_given_once(prefix, tmp_path):
    out = train(*flags(prefix, tmp_path, "--run.accept_changes"))
    assert out.returncode == 0, out.stderr
    assert "accept_changes" not in (tmp_path / "flags.txt").read_text() + (tmp_path / "config.json").read_text()
    out = train(f"--flagfile={tmp_path / 'flags.txt'}", "--optim.lr=0.5")
    assert out.returncode == 2 and "--optim.lr: was 0.0003, now 0.5" in out.stderr


def test_other_data_under_the_same_flags_is_refused(workdir, prefix, tmp_path):
    other = tmp_path / prefix.name
    random = np.random.default_rng(1)
    writer.write(other, [random.integers(0, 64, n) for n in random.integers(5, 60, 200)], np.uint16)
    for path in prefix.parent.glob("x.*"):
        shutil.copy(path, tmp_path / f"kept{path.suffix}")
    saved = json.loads((workdir / "config.json").read_text())["data.path"]
    try:
        for path in other.parent.glob("x.*"):
            shutil.copy(path, prefix.parent)
        status, said = attempt(prefix, workdir)
        assert status == 2 and f"--data.path={saved} is not the data that iteration 4" in said
    finally:
        for suffix, name in ((".bin", "x.bin"), (".idx", "x.idx"), (".json", "x.sums.json")):
            shutil.copy(tmp_path / f"kept{suffix}", prefix.parent / name)
    assert attempt(prefix, workdir)[0] == 0


def test_another_batch_size_goes_on_after_the_samples_that_were_consumed(workdir, prefix):
    for size, steps in ((2, 6), (16, 8)):
        status, said = attempt(
            prefix, workdir, data__global_batch_size=size, run__steps=steps, run__accept_changes=True
        )
        assert status == 0, said
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["consumed_samples"] for r in rows] == [4, 8, 12, 16, 18, 20, 36, 52]
    assert all(r["consumed_tokens"] == 16 * r["consumed_samples"] for r in rows)


def test_another_number_of_threads_is_another_arithmetic(workdir, prefix):
    import torch

    status, said = attempt(prefix, workdir, run__threads=3)
    assert status == 2 and "--run.threads: was 0, now 3" in said
    path, threads = workdir / "checkpoints" / "4" / "meta" / "metadata", torch.get_num_threads()
    meta = json.loads(path.read_text())
    assert meta["arithmetic"]["threads"] >= 1
    status, said = attempt(prefix, workdir, run__threads=3, run__accept_changes=True)
    assert status == 0 and "the last digits of the numbers will differ" in said and "3 now" in said
    torch.set_num_threads(threads)


@pytest.mark.parametrize("lr", [1e38, 1e30])
def test_a_run_that_is_ruined_stops_with_its_own_status_and_keeps_the_good_checkpoints(lr, workdir, prefix):
    before = picture(workdir / "checkpoints")
    status, said = attempt(
        prefix, workdir, optim__lr=lr, run__steps=40, run__stop_after_skipped=5, run__accept_changes=True
    )
    assert status == 4 and f"the last good checkpoint is {workdir / 'checkpoints' / '4'}" in said, said
    assert "Traceback" not in said
    kept = picture(workdir / "checkpoints")
    assert {k: v for k, v in kept.items() if k.startswith("4")} == {
        k: v for k, v in before.items() if k.startswith("4")
    }
    text = (workdir / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and '"nonfinite": {"grad_norm": "nan"}' in text
    assert attempt(prefix, workdir, run__accept_changes=True)[0] == 0


def test_a_run_that_begins_anew_beside_old_logs_keeps_them(workdir, prefix):
    old = [(workdir / name).read_text() for name in ("metrics.jsonl", "train.log")]
    shutil.rmtree(workdir / "checkpoints")
    status, said = attempt(prefix, workdir)
    assert status == 0 and "metrics.1.jsonl" in said
    assert [(workdir / name).read_text() for name in ("metrics.1.jsonl", "train.1.log")] == old
    assert iterations(workdir) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_second_run_in_a_work_folder_is_refused_and_the_first_goes_on(prefix, tmp_path):
    command_line = [sys.executable, "train.py", *flags(prefix, tmp_path, "--run.steps=2000")]
    first = subprocess.Popen(command_line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoints" / "8").is_dir():
        assert first.poll() is None
        time.sleep(0.05)
    status, said = attempt(prefix, tmp_path, run__steps=2000)
    assert status == 2 and f"is in use by process {first.pid}" in said and "Traceback" not in said
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 5
    rows = iterations(tmp_path)
    assert rows == list(range(1, len(rows) + 1))


def test_a_run_outside_of_the_main_thread_says_that_signals_are_not_handled(prefix, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(attempt(prefix, tmp_path)))
    thread.start()
    thread.join()
    assert results[0][0] == 0 and "not in the main thread" in results[0][1]
