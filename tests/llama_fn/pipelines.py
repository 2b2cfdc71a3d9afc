"""Small pipelined steps, and what they must equal: the same on one device."""

from __future__ import annotations

from functools import cache

import torch

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from llama_fn.model import arrays, random, train_step
from sharding import Mesh

TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}


@cache
def traced(layers=4, microbatches=4, dtype="fp64", kv_heads=2, tied=False, often=False):
    cfg = Config(
        model=ModelConfig(
            num_layers=layers, embed_dim=32, num_heads=4, num_kv_heads=kv_heads, mlp_dim=48, vocab_size=64,
            compute_dtype=dtype, tie_embeddings=tied,
        ),
        data=DataConfig(seq_len=8, global_batch_size=2 * microbatches, microbatches=microbatches),
        optim=OptimConfig(reduce_per_microbatch=often), run=RunConfig(steps=10),
    )  # fmt: skip
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    return cfg, step.trace(*train_step.abstract_arguments(cfg))


def trained(lowered, cfg, random_inputs, steps=3):
    """Metrics, and parameters and moments, after some steps."""
    step, rows = lowered.compile("interpret"), []
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
    for i in range(steps):
        state, metrics = step(state, *random_inputs(cfg, i))
        rows.append(torch.stack([metrics["lm_loss"], metrics["grad_norm"]]))
    return [torch.stack(rows), *tree.leaves(state)]


def on_one_device(traced_for, random_inputs, known={}):  # noqa: B006 (a memo)
    if traced_for not in known:
        cfg, step = traced(*traced_for)
        known[traced_for] = trained(step.lower(), cfg, random_inputs)
    return known[traced_for]


def equals_one_device(random_inputs, mesh, pipeline, layers, microbatches, dtype, kv_heads, remat, tied, **more):
    traced_for = layers, microbatches, dtype, kv_heads, tied, more.pop("often", False)
    cfg, step = traced(*traced_for)
    remat = Remat(remat, gathers=more.pop("gathers", False))
    got = trained(step.lower(Mesh.parse(mesh), pipeline=pipeline, remat=remat, **more), cfg, random_inputs)
    for a, b in zip(got, on_one_device(traced_for, random_inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype])
