"""The step against torch's AdamW and clipping, and what it does with numbers that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llama_fn import tree
from llama_fn.config import Config, OptimConfig
from llama_fn.model import llama, optim, train_step, weights


def torch_steps(cfg, state, batches):
    """The same iterations with torch.optim.AdamW, clip_grad_norm_ and autograd in float32."""
    leaves, spec = tree.flatten(state.params)
    params = [torch.nn.Parameter(x.clone()) for x in leaves]
    norms = [name.endswith("norm") for name in tree.paths(state.params)]
    o = cfg.optim
    groups = [
        {"params": [p for p, norm in zip(params, norms, strict=True) if norm], "weight_decay": 0.0},
        {"params": [p for p, norm in zip(params, norms, strict=True) if not norm], "weight_decay": o.weight_decay},
    ]
    adamw = torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps)
    rows = []
    for i, batch in enumerate(batches, 1):
        for group in adamw.param_groups:
            group["lr"] = lr_by_hand(o, i, cfg.run.steps)
        flat = tree.map(lambda x: x.flatten(0, 1), batch)
        nll = llama.nll(
            weights.gather(tree.unflatten(spec, params), llama.abstract_params(cfg.model)),
            flat.tokens,
            flat.targets,
            cfg=cfg.model,
        )
        loss = (nll * flat.loss_mask).sum() / flat.loss_mask.sum()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, o.clip)
        adamw.step()
        rows.append((loss.item(), norm.item()))
    return rows, [p.detach() for p in params]


def lr_by_hand(o, i, steps):
    if i < o.warmup_steps:
        return o.lr * i / o.warmup_steps
    end = o.decay_steps or steps
    done = min(1.0, (i - o.warmup_steps) / (end - o.warmup_steps))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[o.schedule]
    return o.min_lr + (o.lr - o.min_lr) * left if o.schedule != "constant" else o.lr


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_step_equals_torch_adamw(schedule, microbatches, tiny_config, random_inputs, fresh_state, with_data):
    cfg = with_data(tiny_config(init_std=0.1), microbatches=microbatches)
    cfg = replace(cfg, optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, schedule=schedule, clip=0.5))
    state, step = fresh_state(cfg), train_step.make_train_step(cfg)
    batches, hyper = [random_inputs(cfg, i)[0] for i in range(4)], train_step.hyperparameters(cfg)
    want_rows, want_params = torch_steps(cfg, state, batches)
    for i, (batch, (loss, norm)) in enumerate(zip(batches, want_rows, strict=True), 1):
        state, metrics = step(state, batch, hyper)
        assert metrics["lm_loss"].item() == pytest.approx(loss, rel=1e-5)
        assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-4)
        assert metrics["learning_rate"].item() == pytest.approx(lr_by_hand(cfg.optim, i, cfg.run.steps), rel=1e-5)
    for got, want in zip(tree.leaves(state.params), want_params, strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=2e-5)


def test_megatron_learning_rate_at_iteration_three():
    cfg = Config(optim=OptimConfig(lr=1.5e-4, min_lr=1e-5, warmup_steps=3200, decay_steps=320000))
    rate = optim.warmup_decay("cosine")(torch.tensor(3.0), train_step.hyperparameters(cfg))
    assert f"{rate.item():.3E}" == "1.406E-07"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_nonfinite_gradients_skip_the_update_and_are_counted(dtype, tiny_config, random_inputs, fresh_state):
    cfg = tiny_config(compute_dtype=dtype)
    state, step = fresh_state(cfg), train_step.make_train_step(cfg)
    poisoned = tree.map_with_path(
        lambda path, x: x.fill_(float("inf")) if path == "params.final_norm" else x, tree.map(torch.clone, state)
    )
    after, metrics = step(poisoned, *random_inputs(cfg))
    for path, before, now in zip(tree.paths(state), tree.leaves(poisoned), tree.leaves(after), strict=True):
        if path.startswith("params") or ".chain" in path:
            assert torch.equal(before, now), path
    assert metrics["skipped_iterations"].item() == 1 and metrics["nan_iterations"].item() == 1
    assert after.step.item() == 1
    if dtype == "fp16":
        assert after.opt_state.guard.loss_scale.item() == state.opt_state.guard.loss_scale.item() / 2
    good, metrics = step(state, *random_inputs(cfg))
    assert metrics["skipped_iterations"].item() == 0
    assert not torch.equal(good.params.layers.wq, state.params.layers.wq)


def test_fp16_overflow_of_the_scaled_gradient_skips_without_a_nan_loss(tiny_config, random_inputs, fresh_state):
    cfg = tiny_config(compute_dtype="fp16")
    cfg = replace(cfg, optim=replace(cfg.optim, initial_loss_scale=2.0**32))
    state, metrics = train_step.make_train_step(cfg)(fresh_state(cfg), *random_inputs(cfg))
    assert metrics["skipped_iterations"].item() == 1 and metrics["nan_iterations"].item() == 0
    assert state.opt_state.guard.loss_scale.item() == 2.0**31


def test_fp16_loss_scale_doubles_after_a_window_of_good_iterations(tiny_config, random_inputs, fresh_state):
    cfg = tiny_config(compute_dtype="fp16")
    cfg = replace(cfg, optim=replace(cfg.optim, initial_loss_scale=4.0, loss_scale_window=2))
    state, step = fresh_state(cfg), train_step.make_train_step(cfg)
    scales = []
    for i in range(4):
        state, metrics = step(state, *random_inputs(cfg, i))
        scales.append(metrics["loss_scale"].item())
    assert scales == [4.0, 4.0, 8.0, 8.0]


def test_scaled_fp16_gradients_equal_unscaled_float32_ones(tiny_config, random_inputs, fresh_state):
    rows = {}
    for dtype in ("fp32", "fp16"):
        cfg = tiny_config(compute_dtype=dtype, init_std=0.1)
        _, metrics = train_step.make_train_step(cfg)(fresh_state(cfg), *random_inputs(cfg))
        rows[dtype] = metrics["grad_norm"].item()
    assert rows["fp16"] == pytest.approx(rows["fp32"], rel=5e-3)
