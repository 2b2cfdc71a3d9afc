"""The pass that joins a loss and its backward."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch

import kernels as k
from kernels.head_loss import TOKENS_PER_WIDTH
from llama_fn import tree
from llama_fn.compiler import calls, passes, stages
from llama_fn.model import train_step
from llama_fn.model.transforms import value_and_grad
from sharding import Mesh

WHOLE = [each for each in passes.LOWERING if each is not passes.join_loss]


def ops(lowered):
    return [str(node.target).removesuffix(".default") for node, _ in calls.counted(lowered.graph_module)]


def traced(cfg):
    return stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg))


@pytest.mark.parametrize("fused_head", [False, True])
def test_a_step_holds_the_logits_of_a_block(fused_head, tiny_config, random_inputs, fresh_state, monkeypatch):
    """Several blocks, on one device and on two that share the batch, against the step without the pass."""
    cfg = tiny_config(compute_dtype="fp64", fused_head=fused_head)
    cfg = replace(cfg, data=replace(cfg.data, seq_len=128))
    monkeypatch.setattr(import_module("llama_fn.compiler.passes.join_loss"), "block_size", lambda targets: 100)
    results = []
    for mesh, chosen in ((Mesh(), WHOLE), (Mesh(), passes.LOWERING), (Mesh.parse("data:2"), passes.LOWERING)):
        monkeypatch.setattr(passes, "LOWERING", chosen)
        lowered = traced(cfg).lower(mesh, "fsdp")
        found = ops(lowered)
        assert ("llama_fn.head_loss" in found) == (chosen is not WHOLE)
        assert any("cross_entropy" in name for name in found) == (chosen is WHOLE)
        results.append(lowered.compile("interpret")(fresh_state(cfg), *random_inputs(cfg)))
    for got in results[1:]:
        for a, b in zip(tree.leaves(got), tree.leaves(results[0]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_block_less_than_the_tokens_saves_memory(tiny_config, monkeypatch):
    small = tiny_config(vocab_size=4096)
    cfg = replace(small, data=replace(small.data, seq_len=256))
    assert cfg.data.global_batch_size * 256 > TOKENS_PER_WIDTH * cfg.model.embed_dim
    joined = traced(cfg).lower().memory_analysis()
    monkeypatch.setattr(passes, "LOWERING", WHOLE)
    whole = traced(cfg).lower().memory_analysis()
    assert joined.temporary_bytes < 0.6 * whole.temporary_bytes, (joined, whole)


def lowered_gradient(loss_of_nll, logits=lambda x, w: k.einsum("btd,vd->btv", x, w)):
    """Of a loss made of the nll of logits, on abstract arguments."""

    def loss(params, y):
        return loss_of_nll(k.cross_entropy(logits(*params), y)[0])

    arguments = (torch.ones(2, 8, 4), torch.ones(16, 4)), torch.zeros(2, 8, dtype=torch.int64)
    return stages.jit(value_and_grad(loss)).trace(*arguments).lower()


def test_what_depends_on_a_loss_or_reads_logits_stays():
    assert "llama_fn.head_loss" in ops(lowered_gradient(torch.sum))
    assert "llama_fn.head_loss" in ops(lowered_gradient(torch.mean))
    squares = ops(lowered_gradient(lambda nll: (nll * nll).sum()))  # focal loss and its like: the cotangent is 2 nll
    assert "llama_fn.head_loss" not in squares and "llama_fn.cross_entropy_bwd" in squares
    capped = ops(lowered_gradient(torch.sum, lambda x, w: torch.tanh(k.einsum("btd,vd->btv", x, w))))
    assert "llama_fn.head_loss" not in capped


def test_a_sharded_vocabulary_stays_in_parts(tiny_config):
    found = ops(traced(tiny_config()).lower(Mesh.parse("model:2"), "fsdp_tp"))
    assert "llama_fn.head_loss" not in found and "llama_fn.cross_entropy_part_bwd" in found
