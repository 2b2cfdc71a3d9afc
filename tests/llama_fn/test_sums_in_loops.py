"""Sums over what one loop computes are taken in that loop: inductor writes nothing only to sum it."""

import math
import re
from dataclasses import replace

import torch

from llama_fn.compiler import stages
from llama_fn.model import llama, train_step, update
from llama_fn.model.arrays import ArrayInfo

SIZE = 50_000


def update_of(grad):
    update = grad
    for _ in range(12):  # as long as AdamW's: inductor computes it once
        update = (update.abs() + 1.0).sqrt()
    return update


def sum_of_what_a_sum_divides(old, grad):
    update = update_of(grad)
    norm = update.square().sum()
    return old - update, norm, (update / norm).square().sum(), (old - update).sum(), old.square().sum()


def compiled(fn, folder):
    return stages.jit(fn).trace(*[ArrayInfo((SIZE,), torch.float32)] * 2).lower().compile("inductor", cache=folder)


def test_a_sum_that_waits_for_another_stays_apart(tmp_path):
    given = torch.linspace(-1, 2, SIZE), torch.linspace(3, 2, SIZE)
    got = compiled(sum_of_what_a_sum_divides, tmp_path)(*given)
    for one, other in zip(sum_of_what_a_sum_divides(*given), got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_norms_of_new_parameters_and_updates_are_taken_in_the_loop_of_adamw(tiny_config, tmp_path):
    cfg = tiny_config()
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=1000), run=replace(cfg.run, norms_every=5))
    params, scalar = llama.abstract_params(cfg.model), ArrayInfo((), torch.float32)
    hyper = train_step.hyperparameters(cfg, "cpu")
    step = stages.jit(update.make_update(cfg)).trace(
        params, update.abstract_opt_state(cfg), scalar, scalar, params, hyper
    )
    code = step.lower().compile("inductor", cache=tmp_path).executable.code
    loops = re.findall(r"for\(int64_t x0=.*?x0<static_cast<int64_t>\((\d+)L\)", code)
    assert loops.count(str(math.prod(params.embed.shape))) == 4, "of embedding and head one for gradients, one for all"
