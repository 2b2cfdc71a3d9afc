"""Emergency copies: the newest that all processes have wins over every checkpoint that is older, and over no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sharded import together

from llama_fn import config_fields, tree
from llama_fn.checkpoint import LocalCopies, Store, tensors
from llama_fn.config import MeshConfig
from llama_fn.model import train_step
from llama_fn.planner import config_stages
from llama_fn.tree import Leaf
from sharding import Mesh
from sharding.parts import part_of

MESH = MeshConfig(axes="data:2,model:2", rules="fsdp_tp")


@pytest.fixture
def cfg(tiny_config):
    made = tiny_config(num_layers=2, num_kv_heads=4, vocab_size=64)
    return replace(made, mesh=MESH)


@pytest.fixture
def layouts(cfg):
    mesh = Mesh.parse(MESH.axes)
    rules = config_stages.rules(cfg, mesh)
    return [rules.layout(x.axes, x.table, mesh) for x in tree.leaves(train_step.abstract_state(cfg))]


class Started:
    """What a start of a run finds and makes, in every process."""

    def __init__(self, cfg, layouts, folder, monkeypatch):
        self.cfg, self.layouts, self.folder = cfg, layouts, folder
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")

    def mine(self, state, rank) -> Leaf:
        leaves, spec = tree.flatten(state)
        mesh = Mesh.parse(MESH.axes)
        parts = [part_of(x.shape, p, mesh, rank) for x, p in zip(leaves, self.layouts, strict=True)]
        return tree.unflatten(spec, [p.filled(lambda at, x=x: x[at]) for p, x in zip(parts, leaves, strict=True)])

    def all(self, fn):
        """fn(store, rank) in every process."""

        def one(member):
            local = LocalCopies(self.folder / "local", member)
            store = Store(
                train_step.abstract_state(self.cfg), self.folder / "checkpoints", (5, 0), member, "cpu", local
            )
            try:
                return fn(store, member.rank)
            finally:
                store.wait()

        return together(Mesh.parse(MESH.axes), one)

    def copy(self, state, step, others=lambda store, rank: None):
        def one(store, rank):
            store.copy(step, self.mine(state, rank), {"config": config_fields.flat(self.cfg), "step": step})
            store.wait()
            others(store, rank)

        self.all(one)

    def checkpoint(self, state, step):
        self.all(lambda store, rank: store.save(step, self.mine(state, rank), {"step": step}, self.layouts))

    def found(self, cfg=None):
        """The iteration that a start goes on from, and what rank 3 has of it."""
        flags = config_fields.flat(cfg or self.cfg)

        def one(store, rank):
            saved = store.find(config=flags)
            return saved, store.restore(saved, self.layouts)

        results = self.all(one)
        assert len({saved.step for saved, _ in results}) == 1
        return results[3][0], results[3][1]


@pytest.fixture
def run(cfg, layouts, tmp_path, monkeypatch):
    return Started(cfg, layouts, tmp_path, monkeypatch)


def equal(a, b):
    return all(map(torch.equal, tree.leaves(a), tree.leaves(b)))


def test_the_newest_of_both_kinds_wins_bitwise(run, cfg, fresh_state):
    old, new, newest = (fresh_state(cfg, seed) for seed in (1, 2, 3))
    run.checkpoint(old, 10)
    run.copy(new, 15)
    saved, state = run.found()
    assert (saved.step, saved.local) == (15, True) and equal(state, run.mine(new, 3))
    run.checkpoint(newest, 20)
    saved, state = run.found()
    assert (saved.step, saved.local) == (20, False) and equal(state, run.mine(newest, 3))


def test_older_copies_go_when_a_newer_is_complete_and_all_at_the_end(run, cfg, fresh_state, tmp_path):
    for step in (5, 6, 7):
        run.copy(fresh_state(cfg, step), step)
        assert [p.name for p in (tmp_path / "local").iterdir()] == [str(step)]
    run.all(lambda store, rank: store.close())
    assert not (tmp_path / "local").exists()


def test_a_copy_that_one_process_lacks_or_has_damaged_is_passed_over(run, cfg, fresh_state, tmp_path, caplog):
    run.checkpoint(fresh_state(cfg, 1), 10)
    run.copy(fresh_state(cfg, 2), 15)
    victim = max((tmp_path / "local" / "15" / "2" / "ocdbt.process_0" / "d").iterdir(), key=lambda p: p.stat().st_size)
    good = victim.read_bytes()
    victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert run.found()[0].step == 10
    assert "local copy of iteration 15 is not used: process 2" in caplog.text and "another checksum" in caplog.text
    victim.write_bytes(good)
    assert run.found()[0].step == 15
    (tmp_path / "local" / "15" / "1" / "sums.json").unlink()  # killed while it wrote
    assert run.found()[0].step == 10


def test_a_copy_that_fails_is_said_and_leaves_the_one_before(run, cfg, fresh_state, tmp_path, monkeypatch, caplog):
    run.copy(fresh_state(cfg, 1), 5)
    real = tensors.write

    def full(folder, *rest):
        if folder.name == "2":
            raise OSError(28, "No space left on device")
        real(folder, *rest)

    monkeypatch.setattr(tensors, "write", full)
    run.copy(fresh_state(cfg, 2), 6)
    assert "no local copy of iteration 6: process 2: [Errno 28] No space left on device. The run goes on" in caplog.text
    assert [p.name for p in (tmp_path / "local").iterdir()] == ["5"] and run.found()[0].step == 5


def test_copies_of_another_mesh_are_not_used(run, cfg, fresh_state, caplog):
    run.checkpoint(fresh_state(cfg, 1), 10)
    run.copy(fresh_state(cfg, 2), 15)
    other = replace(cfg, mesh=MeshConfig(axes="data:4", rules="fsdp_tp"))
    assert run.found(other)[0].step == 10
    assert "needs --mesh.axes=data:2,model:2, so it is not used" in caplog.text


def test_a_damaged_checkpoint_leaves_the_copy_that_is_newer_than_the_one_before(run, cfg, fresh_state, tmp_path):
    run.checkpoint(fresh_state(cfg, 1), 10)
    run.copy(fresh_state(cfg, 2), 15)
    run.checkpoint(fresh_state(cfg, 3), 20)
    (tmp_path / "checkpoints" / "20" / "meta" / "metadata").write_text("{}")
    saved, _ = run.found()
    assert (saved.step, saved.local) == (15, True)
