"""Checkpoints: bit-exact, readable by plain JAX, and safe against damage and full disks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fn import tree
from llama_fn.checkpoint import Checkpointer
from llama_fn.errors import UserError
from llama_fn.model import train_step


def saved(tmp_path, cfg, state, steps=(1, 2)):
    checkpointer = Checkpointer(tmp_path / "checkpoints", 2, 0)
    for step in steps:
        checkpointer.save(step, tree.map(lambda x, s=step: x + s, state), {"iterator": {"consumed_samples": step}})
    checkpointer.wait()
    return checkpointer


def test_restored_state_is_bitwise_the_saved_one(tmp_path, tiny_config, fresh_state):
    cfg = tiny_config()
    state = fresh_state(cfg)
    checkpointer = saved(tmp_path, cfg, state)
    found = checkpointer.find()
    restored = checkpointer.restore(found, train_step.abstract_state(cfg), "cpu")
    assert found.step == 2 and found.meta["iterator"]["consumed_samples"] == 2
    for a, b in zip(tree.leaves(restored), tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b + 2)


def test_saving_does_not_see_later_changes_of_the_state(tmp_path, tiny_config, fresh_state):
    cfg = tiny_config()
    state = fresh_state(cfg)
    before = state.params.embed.clone()
    checkpointer = Checkpointer(tmp_path / "checkpoints", 2, 0)
    checkpointer.save(1, state, {})
    state.params.embed.fill_(7.0)
    checkpointer.wait()
    restored = checkpointer.restore(checkpointer.find(), train_step.abstract_state(cfg), "cpu")
    assert torch.equal(restored.params.embed, before)


def test_newest_and_every_nth_are_kept(tmp_path, tiny_config, fresh_state):
    checkpointer = Checkpointer(tmp_path / "checkpoints", 2, 4)
    for step in range(1, 8):
        checkpointer.save(step, {"x": torch.ones(2)}, {})
    checkpointer.wait()
    assert checkpointer.steps() == [4, 6, 7]


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
    checkpointer = Checkpointer(tmp_path / "checkpoints", 2, 0)
    found = checkpointer.find()
    restored = checkpointer.restore(found, train_step.abstract_state(cfg), "cpu")
    assert found.step == 1 and torch.equal(restored.params.embed, fresh_state(cfg).params.embed + 1)
    assert (tmp_path / "damaged" / "2.damaged").is_dir()


def test_no_good_checkpoint_at_all_is_an_error(tmp_path, tiny_config, fresh_state):
    cfg = tiny_config()
    saved(tmp_path, cfg, fresh_state(cfg), steps=(1,)).close()
    largest_file(tmp_path / "checkpoints" / "1" / "state").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be restored"):
        Checkpointer(tmp_path / "checkpoints", 2, 0).find()


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from llama_fn.checkpoint import Checkpointer
c = Checkpointer(Path(sys.argv[1]), 2, 0)
c.save(1, {"x": torch.ones(1000)}, {})
c.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    c.save(2, {"x": torch.randn(1 << 20)}, {})
    c.wait()
except ValueError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_that_keeps_the_checkpoint_before(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[2],
    ).stdout  # fmt: skip
    assert "could not be written" in out and "Complete checkpoints there: 1, the newest 1" in out
    assert Checkpointer(tmp_path / "c", 2, 0).steps() == [1]
