"""Checkpoints: bit-exact, readable by plain JAX, and safe against damage and full disks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama_fn import tree
from llama_fn.checkpoint import Store, tensors
from llama_fn.errors import UserError
from llama_fn.model import train_step


def store_of(tmp_path, infos, keep=(2, 0)):
    return Store(infos, tmp_path / "checkpoints", keep)


def saved(tmp_path, cfg, state, steps=(1, 2)):
    store = store_of(tmp_path, train_step.abstract_state(cfg))
    for step in steps:
        store.save(step, tree.map(lambda x, s=step: x + s, state), {"iterator": {"consumed_samples": step}})
    store.wait()
    return store


def test_restored_state_is_bitwise_the_saved_one(tmp_path, tiny_config, fresh_state):
    cfg = tiny_config()
    state = fresh_state(cfg)
    store = saved(tmp_path, cfg, state)
    found = store.find()
    restored = store.restore(found)
    assert found.step == 2 and found.meta["iterator"]["consumed_samples"] == 2
    for a, b in zip(tree.leaves(restored), tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b + 2)


def test_saving_does_not_see_later_changes_of_the_state(tmp_path, tiny_config, fresh_state):
    cfg = tiny_config()
    state = fresh_state(cfg)
    before = state.params.embed.clone()
    store = store_of(tmp_path, train_step.abstract_state(cfg))
    store.save(1, state, {})
    state.params.embed.fill_(7.0)
    store.wait()
    assert torch.equal(store.restore(store.find()).params.embed, before)


def test_a_checkpoint_is_on_disk_before_it_can_be_seen(tmp_path, monkeypatch):
    synced, sync = set(), os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (synced.add(os.fstat(file).st_ino), sync(file))[1])
    store = store_of(tmp_path, {"x": torch.ones(3 << 20), "y": torch.ones(4)})
    commit = store.checkpoints.begin

    def begin(*args):
        commit(*args)
        store.checkpoints.manager.wait_until_finished()
        written = [tmp_path / "checkpoints" / "1" / "state" / "ocdbt.process_0"]
        written += written[0].rglob("*")
        assert len(written) > 4 and synced >= {path.stat().st_ino for path in written}

    monkeypatch.setattr(store.checkpoints, "begin", begin)
    store.save(1, {"x": torch.ones(3 << 20), "y": torch.ones(4)}, {})
    store.close()


def test_a_file_that_the_disk_does_not_take_fails_the_save(tmp_path, monkeypatch):
    store = store_of(tmp_path, {"x": torch.ones(4)})

    def refused(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("llama_fn.checkpoint.integrity.sync", refused)
    store.save(1, {"x": torch.ones(4)}, {})
    with pytest.raises(UserError, match="Input/output error"):
        store.close()
    assert store.checkpoints.steps() == []


def test_newest_and_every_nth_are_kept(tmp_path):
    store = store_of(tmp_path, {"x": torch.ones(2)}, (2, 4))
    for step in range(1, 8):
        store.save(step, {"x": torch.ones(2)}, {})
    store.wait()
    assert store.checkpoints.steps() == [4, 6, 7]


def test_plain_jax_reads_a_checkpoint(tmp_path, tiny_config, fresh_state):
    cfg = tiny_config()
    saved(tmp_path, cfg, fresh_state(cfg)).close()
    code = (
        "import sys, json, orbax.checkpoint as ocp, jax\n"
        "state = ocp.PyTreeCheckpointer().restore(sys.argv[1])\n"
        "wq = jax.numpy.asarray(state['params']['layers']['wq'])\n"
        "print(json.dumps([float(wq.sum()), wq.shape, sorted(state)]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "checkpoints" / "2" / "state")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    total, shape, keys = json.loads(out.splitlines()[-1])
    want = fresh_state(cfg).params.layers.wq + 2
    assert total == pytest.approx(want.sum().item(), rel=1e-5)
    assert shape == list(want.shape) and keys == ["opt_state", "params", "step"]


def largest_file(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(harm, tmp_path, tiny_config, fresh_state, caplog):
    cfg = tiny_config()
    saved(tmp_path, cfg, fresh_state(cfg)).close()
    victim = largest_file(tmp_path / "checkpoints" / "2" / "state")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    {"flip": lambda: victim.write_bytes(content), "truncate": lambda: victim.write_bytes(content[:100]),
     "remove": victim.unlink}[harm]()  # fmt: skip
    store = store_of(tmp_path, train_step.abstract_state(cfg))
    found = store.find()
    restored = store.restore(found)
    assert found.step == 1 and torch.equal(restored.params.embed, fresh_state(cfg).params.embed + 1)
    assert (tmp_path / "damaged" / "2.damaged").is_dir()


def test_no_good_checkpoint_at_all_is_an_error(tmp_path, tiny_config, fresh_state):
    cfg = tiny_config()
    saved(tmp_path, cfg, fresh_state(cfg), steps=(1,)).close()
    largest_file(tmp_path / "checkpoints" / "1" / "state").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be restored"):
        store_of(tmp_path, train_step.abstract_state(cfg)).find()


FULL_DISK = """
import logging, resource, signal, sys, torch
from pathlib import Path
from llama_fn.checkpoint import Store, tensors
logging.basicConfig(stream=sys.stdout, format="%(message)s")
state = {"x": torch.randn(1 << 20)}
store = Store(state, Path(sys.argv[1]), (2, 0))
store.save(1, state, {})
store.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, unlimited[1]))
store.save(2, state, {})
store.wait()
print("steps", store.checkpoints.steps())
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
if sys.argv[2] == "mended":
    store.save(3, state, {})
try:
    store.close()
except ValueError as error:
    print("ended with:", error)
"""


@pytest.mark.parametrize("then", ["mended", pytest.param("still full", marks=pytest.mark.slow)])
def test_a_save_that_fails_is_said_and_the_next_may_succeed(then, tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c"), then], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[2],
    ).stdout  # fmt: skip
    assert "the checkpoint of iteration 2 could not be written" in out and "The run goes on" in out
    assert "Complete checkpoints there: 1, the newest 1" in out and "steps [1]" in out
    assert ("ended with: the checkpoint of iteration 2" in out) == (then == "still full")
    steps = [1, 3] if then == "mended" else [1]
    assert Store({"x": torch.ones(1)}, tmp_path / "c", (2, 0)).checkpoints.steps() == steps


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch, caplog):
    store = store_of(tmp_path, {"x": torch.ones(1000)})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    store.save(1, {"x": torch.ones(1000)}, {})
    with pytest.raises(UserError, match=r"\): it takes 16\.8 MB, and 1\.0 MB are free; nothing was begun"):
        store.close()
    assert all(record.exc_info is None for record in caplog.records)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_fault_in_a_save_is_said_with_its_kind_and_where_it_came_from(tmp_path, monkeypatch, caplog):
    """It is no full disk, whose words alone say enough."""
    store = store_of(tmp_path, {"x": torch.ones(4)})
    monkeypatch.setattr(store.checkpoints, "begin", lambda *_: [][0])
    store.save(1, {"x": torch.ones(4)}, {})
    with pytest.raises(UserError, match=r"IndexError: list index out of range"):
        store.close()
    (said,) = [record for record in caplog.records if "could not be written" in record.message]
    assert said.exc_info[0] is IndexError


def test_what_processes_say_of_a_step_when_it_is_looked_at_again_has_another_name(tmp_path, tiny_config, fresh_state):
    """A run that goes back finds and restores the same step twice: the first words are still in the store."""
    cfg = tiny_config(num_layers=1)
    store = saved(tmp_path, cfg, fresh_state(cfg))
    said = []
    store.saver.words = lambda about, word: said.append(about) or [word]
    for _ in range(2):
        store.restore(store.find())
    assert len(said) == 4 == len(set(said))


@pytest.mark.parametrize("jump_s", [-7200, 7200])
def test_a_clock_that_is_set_during_a_save_does_not_end_it(jump_s, tmp_path, monkeypatch):
    real, write, shift = time.time, tensors.write, [0.0]

    def slow(*args):
        shift[0] = jump_s
        time.sleep(0.2)
        write(*args)

    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    monkeypatch.setattr(tensors, "write", slow)
    store = store_of(tmp_path, {"x": torch.ones(2)})
    store.save(1, {"x": torch.ones(2)}, {})
    store.wait()
    assert not store.saver.failure and store.checkpoints.steps() == [1]
