"""Hyper-parameters are inputs of the step: other numbers need no other graph, and no compilation."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from llama_fn import tree
from llama_fn.config import Config, OptimConfig, RunConfig
from llama_fn.model import train_step
from llama_fn.planner import config_stages

CHANGES = {
    "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 5, "decay_steps": 7, "b1": 0.0, "b2": 0.999, "eps": 1e-6,
    "weight_decay": 0.0, "clip": 0.0, "loss_scale_window": 2,
}  # fmt: skip
OF_THE_GRAPH = {"schedule", "reduce_dtype", "reduce_per_microbatch"}
OF_THE_STATE = {"initial_loss_scale"}


def changed(cfg: Config) -> list[Config]:
    """cfg with each of its hyper-parameters changed alone, all of them, and the length of the run."""
    alone = [replace(cfg, optim=replace(cfg.optim, **{name: value})) for name, value in CHANGES.items()]
    longer = replace(cfg, run=replace(cfg.run, steps=99))
    return [*alone, longer, replace(longer, optim=replace(cfg.optim, **CHANGES))]


def test_every_number_of_the_optimizer_is_looked_at():
    assert {field.name for field in fields(OptimConfig)} == {*CHANGES, *OF_THE_GRAPH, *OF_THE_STATE}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_other_numbers_give_the_same_graph(tiny_config, dtype):
    cfg = tiny_config(compute_dtype=dtype)
    text = config_stages.train(cfg).as_text()
    for other in changed(cfg):
        assert config_stages.train(other).as_text() == text, other.optim
    assert config_stages.train(replace(cfg, optim=replace(cfg.optim, schedule="linear"))).as_text() != text


@pytest.mark.slow
def test_inductor_compiles_once_and_steps_are_those_of_the_numbers(tiny_config, random_inputs, fresh_state, tmp_path):
    cfg = tiny_config(num_layers=1)
    others = changed(cfg)[-2:]
    seen = [config_stages.train(each).lower().compile("inductor", cache=tmp_path) for each in (cfg, *others)]
    assert [step.from_cache for step in seen] == [False, True, True]
    for other, step in zip(others, seen[1:], strict=True):
        want = train_step.make_train_step(other)(fresh_state(other), *random_inputs(other))
        got = step(fresh_state(other), *random_inputs(other))
        for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_number_that_turns_something_off_does(tiny_config, random_inputs, fresh_state):
    """Nothing is clipped or decayed, and the moments are the gradients, whatever the gradient is."""
    cfg = replace(tiny_config(init_std=0.1), optim=OptimConfig(clip=0.0, weight_decay=0.0, b1=0.0, lr=0.1, min_lr=0.1))
    state = fresh_state(cfg)
    inputs = random_inputs(cfg)
    after, metrics = train_step.make_train_step(cfg)(state, *inputs)
    squares = sum(torch.sum(mu.double() ** 2) for mu in tree.leaves(after.opt_state.chain[1].mu))
    assert metrics["grad_norm"].item() ** 2 == pytest.approx(squares.item(), rel=1e-5)
    for before, now, mu in zip(
        *map(tree.leaves, (state.params, after.params, after.opt_state.chain[1].mu)), strict=True
    ):
        step = mu / (mu.abs() + 1e-8)  # Adam's first step is the sign, but for epsilon
        torch.testing.assert_close(before - now, 0.1 * step, rtol=1e-3, atol=1e-5)


def test_numbers_keep_their_digits():
    h = train_step.hyperparameters(Config(optim=OptimConfig(b2=0.999), run=RunConfig(steps=10)))
    assert h.b2_rest.item() == torch.tensor(0.001).item() != 1 - h.b2.item()
    assert h.decay_steps.item() == 10 and h.warmup_steps.item() == 0
