"""Checkpoints of several processes: each writes and reads its own parts, on any mesh what was saved on any other."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from sharded import together

from llama_fn import tree
from llama_fn.checkpoint import Store, layout, tensors
from llama_fn.config import MeshConfig
from llama_fn.errors import SaidElsewhere, UserError
from llama_fn.model import train_step
from llama_fn.planner import config_stages
from sharding import Mesh, P
from sharding.parts import part_of
from sharding.stages import Pipeline, stage_count, stages_of

MESHES = {
    "one": MeshConfig(),
    "data:2,model:2": MeshConfig(axes="data:2,model:2", rules="fsdp_tp"),
    "model:4": MeshConfig(axes="model:4", rules="tp_sp"),
    "dp": MeshConfig(axes="data:4", rules="dp"),
    "pipe:2,data:2": MeshConfig(axes="pipe:2,data:2", rules="fsdp"),
    "interleaved": MeshConfig(axes="pipe:2,data:2", rules="zero1", schedule="interleaved", chunks=2),
}


@pytest.fixture
def laid_out():
    """Mesh and layouts of the state by name, as lowering finds them."""

    def of(cfg, name):
        m = MESHES[name]
        mesh = Mesh.parse(m.axes)
        rules = config_stages.rules(replace(cfg, mesh=m), mesh)
        if stage_count(mesh) > 1:
            stages = stages_of(Pipeline(m.schedule, m.chunks), stage_count(mesh), cfg.model.num_layers)
            rules = replace(rules, blocks=stages.sizes)
        return mesh, [rules.layout(x.axes, x.table, mesh) for x in tree.leaves(train_step.abstract_state(cfg))]

    return of


@pytest.fixture
def cfg(tiny_config):
    made = tiny_config(num_layers=4, num_kv_heads=4, vocab_size=64)
    return replace(made, data=replace(made.data, global_batch_size=16, microbatches=4))


def mine(state, layouts, mesh, rank):
    leaves, spec = tree.flatten(state)
    return tree.unflatten(spec, [
        part_of(x.shape, p, mesh, rank).filled(lambda at, x=x: x[at]) for x, p in zip(leaves, layouts, strict=False)
    ])  # fmt: skip


def save(folder, cfg, state, mesh, layouts, step=1):
    def one(member):
        processes = member if mesh.size > 1 else None
        store = Store(train_step.abstract_state(cfg), folder, (5, 0), processes)
        own = state if processes is None else mine(state, layouts, mesh, member.rank)
        store.save(step, own, {"step": step}, layouts)
        store.close()

    together(mesh, one)


def restored(folder, cfg, mesh, layouts):
    def one(member):
        store = Store(train_step.abstract_state(cfg), folder, (5, 0), member if mesh.size > 1 else None)
        found = store.find()
        state = store.restore(found, layouts)
        store.close()
        return state

    return together(mesh, one)


def test_what_one_mesh_saves_every_other_restores_bitwise(cfg, laid_out, fresh_state, tmp_path):
    state = fresh_state(cfg)
    for name in MESHES:
        mesh, layouts = laid_out(cfg, name)
        save(tmp_path / name, cfg, state, mesh, layouts)
    for source, target in [*pairwise(MESHES), *((name, "one") for name in MESHES), ("interleaved", "data:2,model:2")]:
        mesh, layouts = laid_out(cfg, target)
        for rank, got in enumerate(restored(tmp_path / source, cfg, mesh, layouts)):
            want = state if mesh.size == 1 else mine(state, layouts, mesh, rank)
            assert all(map(torch.equal, tree.leaves(got), tree.leaves(want))), (source, target, rank)


def test_layouts_here_are_those_of_lowering(cfg, laid_out):
    mine = replace(cfg, mesh=MESHES["interleaved"])
    mesh, layouts = laid_out(cfg, "interleaved")
    assert list(config_stages.lower(config_stages.train(mine), mine, mesh).inputs[: len(layouts)]) == layouts


def test_each_region_is_written_once_and_copies_in_turn(cfg, laid_out):
    infos = train_step.abstract_state(cfg)
    for name in MESHES:
        mesh, layouts = laid_out(cfg, name)
        by_rank = [layout.stored(infos, layouts, mesh, rank) for rank in range(mesh.size)]
        for path, info in tree.by_path(infos).items():
            written = np.zeros(info.shape, int)
            for arrays in by_rank:
                for at, _ in arrays[path].written:
                    written[at] += 1
                    assert all(s.start % c == 0 for s, c in zip(at, arrays[path].chunk, strict=True))
                    assert all(
                        s.stop % c == 0 or s.stop == n
                        for s, c, n in zip(at, arrays[path].chunk, info.shape, strict=True)
                    )
            assert (written == 1).all(), (name, path)
        sizes = [
            sum(prod(s.stop - s.start for s in at) for array in arrays.values() for at, _ in array.written)
            for arrays in by_rank
        ]
        assert max(sizes) < 2 * sum(sizes) / mesh.size, f"{name}: {sizes}"


def test_a_region_that_ends_in_padding_is_whole():
    """10 rows over 4: 3, 3, 3 and 1."""
    mesh, info = Mesh.parse("data:4"), torch.zeros(10, 2)
    arrays = [layout.stored({"x": info}, [P("data", None)], mesh, rank)["x"] for rank in range(4)]
    assert {array.chunk for array in arrays} == {(3, 2)}
    assert [array.written[0][0][0] for array in arrays] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]


def test_chunks_are_small_and_divide(monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_BYTES", 1000)
    for shape in ((64, 100), (7, 11, 13), (100000,), ()):
        array = layout.stored({"x": torch.zeros(shape)}, None, Mesh(), 0)["x"]
        assert prod(array.chunk) * 4 <= 1000 and all(n % c == 0 for n, c in zip(shape, array.chunk, strict=True))


def test_a_process_that_cannot_write_leaves_no_checkpoint_and_the_next_save_succeeds(
    cfg, laid_out, fresh_state, tmp_path, monkeypatch, caplog
):
    mesh, layouts = laid_out(cfg, "data:2,model:2")
    state, real = fresh_state(cfg), tensors.write

    def one(member):
        store = Store(train_step.abstract_state(cfg), tmp_path, (5, 0), member)
        for step in (1, 2, 3):
            store.save(step, mine(state, layouts, mesh, member.rank), {}, layouts)
            store.wait()
        store.close()

    def failing(folder, process, *rest):
        if process == 2 and (tmp_path / "1").exists() and not (tmp_path / "3").exists() and not failed:
            failed.append(process)
            raise OSError(28, "No space left on device")
        real(folder, process, *rest)

    failed: list[int] = []
    monkeypatch.setattr(tensors, "write", failing)
    together(mesh, one)
    assert (
        failed == [2] and "process 2: [Errno 28] No space left on device. Complete checkpoints there: 1" in caplog.text
    )
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["1", "3"]
    (got,) = restored(tmp_path, cfg, Mesh(), None)
    assert all(map(torch.equal, tree.leaves(got), tree.leaves(state)))


def test_damage_is_found_by_whoever_looks_at_the_file(cfg, laid_out, fresh_state, tmp_path, caplog):
    mesh, layouts = laid_out(cfg, "data:2,model:2")
    for step in (1, 2):
        save(tmp_path / "checkpoints", cfg, fresh_state(cfg, step), mesh, layouts, step)
    for process in range(4):
        files = (tmp_path / "checkpoints" / "2" / "state" / f"ocdbt.process_{process}" / "d").iterdir()
        victim = max(files, key=lambda file: file.stat().st_size)
        good = victim.read_bytes()
        victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        for rank, got in enumerate(restored(tmp_path / "checkpoints", cfg, mesh, layouts)):
            want = mine(fresh_state(cfg, 1), layouts, mesh, rank)
            assert all(map(torch.equal, tree.leaves(got), tree.leaves(want)))
        assert f"ocdbt.process_{process}/d/{victim.name} has another checksum" in caplog.text
        (tmp_path / "damaged" / "2.damaged").rename(tmp_path / "checkpoints" / "2")
        victim.write_bytes(good)


def test_another_state_is_refused_by_all(cfg, laid_out, fresh_state, tmp_path):
    mesh, layouts = laid_out(cfg, "data:2,model:2")
    save(tmp_path, cfg, fresh_state(cfg), mesh, layouts)
    other = replace(cfg, model=replace(cfg.model, mlp_dim=96))
    errors = []

    def one(member):
        with pytest.raises(UserError if member.chief else SaidElsewhere) as error:
            Store(train_step.abstract_state(other), tmp_path, (5, 0), member).find()
        errors.append(str(error.value))

    together(mesh, one)
    assert all("state.params.layers.w_gate" in error for error in errors) and len(errors) == 4


def test_what_plain_jax_wrote_is_read(tmp_path):
    """By Orbax's own defaults (zarr2, compressed) and with zarr3, sharded over four devices."""
    code = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(jax.devices(), ("x",))
x = jax.device_put(jnp.arange(96.0).reshape(8, 12), NamedSharding(mesh, P("x")))
tree = {"a": {"b": x, "half": x.astype(jnp.bfloat16)}, "n": jnp.int32(7)}
for name, zarr3 in (("two", False), ("three", True)):
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(f"{sys.argv[1]}/{name}", args=ocp.args.PyTreeSave(tree))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, cwd=tmp_path)
    want = torch.arange(96.0).reshape(8, 12)
    for name in ("two", "three"):
        reader = tensors.Reader(tmp_path / name)
        part = part_of((8, 12), P("data", None), Mesh.parse("data:2"), 1)
        assert torch.equal(reader.part("a.b", part, "cpu"), want[4:])
        half = reader.part("a.half", part, "cpu")
        assert half.dtype == torch.bfloat16 and torch.equal(half, want[4:].bfloat16())
        assert int(reader.array("n").read().result()) == 7


def test_zeros_are_written_and_a_chunk_that_is_not_there_is_an_error(tmp_path):
    tensors.process_folder(tmp_path, 0).mkdir(parents=True)
    held = torch.zeros(8, 4)
    array = replace(layout.stored({"x": held}, None, Mesh(), 0)["x"], chunk=(4, 4))
    writer = tensors.Writer(tmp_path, 0)
    writer.write("x", array, (slice(0, 4), slice(0, 4)), held[:4])
    reader = tensors.Reader(tensors.process_folder(tmp_path, 0), zarr3=True)
    assert torch.equal(reader.tensor("x", (slice(0, 4), slice(0, 4))), held[:4])
    with pytest.raises(ValueError, match="missing"):
        reader.tensor("x", (slice(0, 8), slice(0, 4)))
