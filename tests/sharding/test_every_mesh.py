"""Every mesh of 1, 2, 4 and 8 devices that fits llama_tiny, under every preset of rules, against one device."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from on_purpose import copies

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.config import Config
from llama_fn.errors import UserError
from llama_fn.model import arrays, random, train_step
from sharding import Mesh

AXES = {
    "dp": ("node", "data"),
    "zero1": ("node", "data"),
    "fsdp": ("node", "data"),
    "tp_sp": ("data", "model"),
    "fsdp_tp": ("node", "data", "model"),
    "fsdp_tp_ulysses": ("data", "context", "model"),
}
STEPS = 5


def meshes(names):
    """Every way to lay 1, 2, 4 or 8 devices over the axes, all axes present."""
    sizes = [()]
    for _ in names:
        sizes = [(*s, n) for s in sizes for n in (1, 2, 4, 8)]
    return [Mesh(tuple(zip(names, s, strict=True))) for s in sizes if prod(s) <= 8]


def train(lowered, cfg, random_inputs):
    step = lowered.compile("interpret")
    state, rows = arrays.materialize(train_step.abstract_state(cfg), random.key(0)), []
    for i in range(STEPS):
        state, metrics = step(state, *random_inputs(cfg, i))
        rows.append(torch.stack([metrics["lm_loss"], metrics["grad_norm"]]))
    return torch.stack(rows), tree.leaves(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-5)])
def test_llama_tiny_on_every_mesh_equals_one_device(dtype, tolerance, kv_heads, random_inputs):
    cfg = Config()
    cfg = replace(
        cfg,
        model=replace(cfg.model, compute_dtype=dtype, num_kv_heads=kv_heads),
        data=replace(cfg.data, seq_len=32),
        optim=replace(cfg.optim, warmup_steps=2),
    )
    traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg))
    want, want_params = train(traced.lower(), cfg, random_inputs)
    done, refused = 0, []
    for rules, names in AXES.items():
        for mesh in meshes(names):
            try:
                lowered = traced.lower(mesh, copies(rules, mesh))
            except UserError as error:
                assert "do not divide" in str(error)
                refused.append(f"{rules} {mesh}")
                continue
            got, params = train(lowered, cfg, random_inputs)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
            for a, b in zip(params, want_params, strict=True):
                # In the norm: Adam turns the round-off of a gradient near its epsilon into a step of any size.
                assert torch.linalg.vector_norm((a - b).double()) <= tolerance * torch.linalg.vector_norm(b.double())
            done += 1
            print(f"{dtype}, {kv_heads} kv heads, {rules} on {mesh}: equal", flush=True)
    print(f"{done} meshes equal, {len(refused)} do not fit: {refused}", flush=True)
    # 4 heads (2 kv heads) fit up to 4 (2) devices along model, and context.
    assert done >= 50
