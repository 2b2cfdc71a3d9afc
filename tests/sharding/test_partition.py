"""Partitioned == single device: whole steps under every preset; what cannot be partitioned is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_purpose import copies

import kernels as k
from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.errors import UserError
from llama_fn.model import arrays, random, train_step
from llama_fn.model.arrays import ArrayInfo
from sharding import Mesh, P, constrain
from sharding.rules import PRESETS, Rules

F64 = torch.float64
MESH = Mesh.parse("x:2,y:2")
MESHES = {
    "dp": ["data:2", "data:4", "node:2,data:4"],
    "zero1": ["data:2", "data:4", "data:8"],
    "fsdp": ["data:2", "data:4", "node:2,data:2", "data:8"],
    "tp_sp": ["model:2", "model:4"],
    "fsdp_tp": ["data:2,model:2", "data:2,model:4", "data:4,model:2", "data:2", "model:2"],
    "fsdp_tp_ulysses": ["context:2", "data:2,context:2,model:2", "context:2,model:2", "context:4"],
}


def step_config(tiny_config, with_data, dtype, kv_heads, **optim):
    cfg = tiny_config(compute_dtype=dtype, num_heads=8, num_kv_heads=kv_heads, embed_dim=64, vocab_size=96)
    cfg = with_data(cfg, microbatches=2, global_batch_size=16)
    return replace(cfg, optim=replace(cfg.optim, warmup_steps=2, **optim))


def train(traced, cfg, random_inputs, mesh, rules, steps=5):
    compiled = traced.lower(Mesh.parse(mesh), copies(rules, Mesh.parse(mesh))).compile("interpret")
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
    rows = []
    for i in range(steps):
        state, metrics = compiled(state, *random_inputs(cfg, i))
        rows.append(torch.stack([metrics["lm_loss"], metrics["grad_norm"]]))
    return torch.stack(rows), state


# test_every_mesh.py has every mesh with every pair of these, nightly.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "kv_heads"), [("fp64", 1e-10, 4), pytest.param("fp32", 1e-5, 4, marks=pytest.mark.slow)]
)
def test_steps_on_every_mesh_equal_the_single_device(dtype, tolerance, kv_heads, tiny_config, with_data, random_inputs):
    cfg = step_config(tiny_config, with_data, dtype, kv_heads)
    traced = traced_step(cfg)
    want, want_state = train(traced, cfg, random_inputs, "", "dp")
    for rules, meshes in MESHES.items():
        for mesh in meshes:
            got, state = train(traced, cfg, random_inputs, mesh, rules)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
            for a, b in zip(tree.leaves(state.params), tree.leaves(want_state.params), strict=True):
                # In the norm: Adam turns the round-off of a gradient near its epsilon into a step of any size.
                assert torch.linalg.vector_norm((a - b).double()) <= tolerance * torch.linalg.vector_norm(b.double())


def traced_step(cfg):
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    return step.trace(*train_step.abstract_arguments(cfg))


@pytest.mark.slow
def test_the_fused_head_is_vocabulary_parallel(tiny_config, with_data, random_inputs):
    cfg = step_config(tiny_config, with_data, "fp64", 8)
    want, _ = train(traced_step(cfg), cfg, random_inputs, "", "dp", steps=2)
    fused = replace(cfg, model=replace(cfg.model, fused_head=True))
    for mesh in ("model:2", "data:2,model:4"):
        got, _ = train(traced_step(fused), fused, random_inputs, mesh, "fsdp_tp", steps=2)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_reducing_for_every_microbatch_gives_the_same(tiny_config, with_data, random_inputs):
    results = {}
    for each in (False, True):
        cfg = step_config(tiny_config, with_data, "fp64", 8, reduce_per_microbatch=each)
        lowered = traced_step(cfg).lower(Mesh.parse("data:2,model:2"), "fsdp_tp", without=["bucket"])
        rows = [r for r in lowered.collectives() if r.scope.endswith("reduce/layers/*/wq")]
        assert sum(r.count for r in rows) == cfg.model.num_layers * (2 if each else 1)
        results[each] = train(traced_step(cfg), cfg, random_inputs, "data:2,model:2", "fsdp_tp", steps=2)[0]
    torch.testing.assert_close(results[True], results[False], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("compute", 2)])
def test_gradients_are_reduced_in_the_dtype_asked_for(dtype, width, tiny_config):
    cfg = tiny_config(compute_dtype="bf16")
    cfg = replace(cfg, optim=replace(cfg.optim, reduce_dtype=dtype))
    rows = traced_step(cfg).lower(Mesh.parse("data:2"), "fsdp", without=["bucket"]).collectives()
    size = cfg.model.embed_dim * cfg.model.mlp_dim * width // 2
    assert [r.bytes for r in rows if r.scope == "reduce/layers/*/w_up"] == [size]
    assert {r.dtype for r in rows if r.scope.startswith("gather")} == {"bfloat16"}, "weights travel in compute dtype"


@pytest.mark.parametrize("rules", PRESETS)
def test_bytes_at_rest_are_the_total_over_the_shards(rules, tiny_config):
    """Every leaf's bytes on a device times the devices that share it are its bytes, to the byte."""
    cfg = tiny_config(num_heads=4, num_kv_heads=4)
    mesh = Mesh.parse("data:2,context:2,model:2")
    lowered = traced_step(cfg).lower(mesh, copies(rules, mesh))
    nodes = [n for n in lowered.graph_module.graph.nodes if n.op == "placeholder"]
    shards = {"dp": 1, "zero1": 1, "fsdp": 2, "tp_sp": 2, "fsdp_tp": 4, "fsdp_tp_ulysses": 8}[rules]
    for info, node, layout in zip(lowered.signature.in_infos, nodes, lowered.inputs, strict=True):
        here = node.meta["val"].numel() * info.dtype.itemsize
        assert here * mesh.extent(axis for axes in layout.by_dim for axis in axes) == info.bytes
    wq = lowered.signature.in_paths.index("state.params.layers.wq")
    assert lowered.signature.in_infos[wq].size == shards * nodes[wq].meta["val"].numel()


def test_errors_say_where_what_and_what_to_write(tiny_config):
    traced = traced_step(tiny_config(num_kv_heads=2))
    said = r"params\.layers\.wk: constrain in gather/layers/0/wk.*dimension 1 .* size 2, which 4 devices along model"
    with pytest.raises(UserError, match=said):
        traced.lower(Mesh.parse("model:4"), "tp_sp")
    with pytest.raises(UserError, match="Did you mean fsdp"):
        traced.lower(Mesh.parse("data:2"), "fdsp")
    double = Rules("double", {"vocab": ("data",), "embed": ("data",)}, {}, {})
    with pytest.raises(UserError, match=r"'data'.* used twice"):
        traced.lower(Mesh.parse("data:2"), double)
    a, b = ArrayInfo((4, 4), F64, ("p", "q"), table="compute"), ArrayInfo((4, 4), F64, ("q", "r"), table="compute")
    rules = Rules("test", {}, {}, {"q": ("x",)})

    def pending(a, b):
        return torch.sqrt(k.einsum("pq,qr->pr", a, b))

    def conflict(a, b):
        return k.einsum("pq,qr->pr", a, constrain(b, P(None, None)))

    def returned(a, b):
        return k.einsum("pq,qr->pr", a, b)

    for fn, text in (
        (pending, r"sqrt.* partial sum over x .*Write constrain"),
        (conflict, r"einsum in .*test_partition\.py:\d+.* one sharding for 'q'.*Write a constrain"),
        (returned, r"result out is still a partial sum over \['x'\]"),
    ):
        with pytest.raises(UserError, match=text):
            stages.jit(fn).trace(a, b).lower(MESH, copies(rules, MESH))
