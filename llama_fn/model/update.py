"""What a training step does with gradients: it clips them and makes AdamW's update, unless a number is not finite.

loss_sum, tokens: float32 scalars, the loss summed over unmasked tokens, and their number. grads: of loss_sum / tokens
times the loss scale, a tree like the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.rms_norm import upcast
from llama_fn import tree
from llama_fn.config import Config
from llama_fn.model import llama, optim
from llama_fn.model.arrays import ArrayInfo, Init
from llama_fn.model.hyper import Hyper
from llama_fn.tree import Leaf, Tree
from sharding import P, constrain

MAX_LOSS_SCALE = 2.0**32
Update = Callable[..., tuple[llama.Params, "OptState", dict[str, Any]]]


@tree.dataclass
class Guard:
    """What protects a run from non-finite numbers: the fp16 loss scale and the counts of what was refused."""

    loss_scale: Leaf  # [] float32; 1 and constant unless compute_dtype is fp16
    good_steps: Leaf  # [] float32, updates since the scale last changed
    skipped: Leaf  # [] float32, iterations without an update so far
    nan: Leaf  # [] float32, iterations so far whose loss was not finite, or whose update left parameters that are not


@tree.dataclass
class OptState:
    """The state of the optimizer's chain (optim.py), and the guard's."""

    chain: Tree
    guard: Guard


def abstract_opt_state(cfg: Config) -> OptState:
    """Its declaration; its init gives iteration 0."""
    params = llama.abstract_params(cfg.model)
    scale = cfg.optim.initial_loss_scale if cfg.model.compute_dtype == "fp16" else 1.0
    zero = ArrayInfo((), torch.float32)
    guard = Guard(ArrayInfo((), torch.float32, init=Init(value=scale)), zero, zero, zero)
    return OptState(optim.adamw(cfg, params).init(params), guard)


def make_update(cfg: Config) -> Update:
    """(params, opt_state, loss_sum, tokens, grads, hyper) -> (params, opt_state, metrics). An iteration whose loss or
    gradients are not finite leaves params and moments as they were.

    metrics, all float32 scalars: lm_loss (mean nats per unmasked token), grad_norm (before clipping),
    learning_rate, loss_scale (used in this step), skipped_iterations and nan_iterations (since iteration 0), and
    nonfinite_params: 1 where the update itself overflowed, which no later step mends. That is seen and not undone:
    holding the update back until every leaf is known would take a second copy of the state. With run.norms_every also
    norms: of the new parameters, the gradients before clipping and the updates, what optim.norms gives.
    """
    infos = llama.abstract_params(cfg.model)
    optimizer = optim.adamw(cfg, infos)

    def update(
        old_params: llama.Params, opt_state: OptState, loss_sum: torch.Tensor, tokens: torch.Tensor,
        grads: llama.Params, hyper: Hyper,
    ) -> tuple[llama.Params, OptState, dict[str, Any]]:  # fmt: skip
        guard = opt_state.guard
        loss = constrain(loss_sum, P()) / tokens
        grads = tree.map(lambda g: upcast(g) / guard.loss_scale, grads)
        norm = optim.global_norm(grads, infos)
        # Gradients are read for the last time by the update then, which can be written where they are.
        grad_norms = optim.norms(grads, infos) if cfg.run.norms_every else {}
        loss_ok = _finite(loss)
        ok = loss_ok & _finite(norm)
        old = (old_params, opt_state.chain)
        updates, chain = optimizer.update(grads, opt_state.chain, old_params, hyper=hyper, grad_norm=norm)
        params = optim.apply_updates(old_params, updates)
        params, chain = tree.map(lambda new, was: torch.where(ok, new, was), (params, chain), old)
        metrics: dict[str, Any] = {
            "lm_loss": loss,
            "grad_norm": norm,
            "learning_rate": optimizer.learning_rate(opt_state.chain, hyper),
            "loss_scale": guard.loss_scale,
        }
        if cfg.run.norms_every:
            param_norms, update_norms = (optim.norms(values, infos) for values in (params, updates))
            metrics["norms"] = {"param": param_norms, "grad": grad_norms, "update": update_norms}
        params_ok = _all_finite(params)
        guard = _next_guard(guard, ok, loss_ok & params_ok, hyper, cfg.model.compute_dtype)
        metrics |= {
            "skipped_iterations": guard.skipped,
            "nan_iterations": guard.nan,
            "nonfinite_params": torch.where(params_ok, torch.zeros_like(guard.nan), torch.ones_like(guard.nan)),
        }
        return params, OptState(chain, guard), metrics

    return update


def _next_guard(guard: Guard, ok: torch.Tensor, numbers: torch.Tensor, hyper: Hyper, dtype: str) -> Guard:
    """Counts of this iteration added; in fp16 the scale halves on overflow, doubles after a window of good ones."""
    one = torch.ones_like(guard.skipped)
    skipped = guard.skipped + torch.where(ok, 0.0 * one, one)
    nan = guard.nan + torch.where(numbers, 0.0 * one, one)
    if dtype != "fp16":
        return Guard(guard.loss_scale, guard.good_steps, skipped, nan)
    good = torch.where(ok, guard.good_steps + 1, 0.0 * one)
    grow = good >= hyper.loss_scale_window
    factor = torch.where(ok, torch.where(grow, 2.0 * one, one), 0.5 * one)
    scale = torch.clamp(guard.loss_scale * factor, 1.0, MAX_LOSS_SCALE)
    return Guard(scale, torch.where(grow, 0.0 * one, good), skipped, nan)


def _finite(x: torch.Tensor) -> torch.Tensor:
    # isfinite has no NPU lowering; x - x is 0 for finite x and nan otherwise.
    return (x - x) == 0


def _all_finite(params: llama.Params) -> torch.Tensor:
    """Whether every element is: a sum over inf or nan is one of them, whatever is added. (Elements of 1e30, whose sum
    may overflow, are as good as lost.)"""
    return _finite(torch.stack([constrain(torch.sum(upcast(p)), P()) for p in tree.leaves(params)]).sum())
