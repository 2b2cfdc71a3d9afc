"""The pure training step: (state, batch, hyper) -> (state, metrics), everything of one iteration in one function.

batch: tokens, targets int64 [M, B, T] and loss_mask float32 [M, B, T] (M microbatches of B samples); with several
documents in a row also starts int64 [M, B, T].
hyper: scalars that may change from run to run (hyper.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import kernels as k
from kernels.rms_norm import upcast
from kernels.scope_names import microbatch
from llama_fn import tree
from llama_fn.config import Config
from llama_fn.config_checks import check
from llama_fn.model import llama, optim, weights
from llama_fn.model.arrays import DTYPES, ArrayInfo, Init
from llama_fn.model.hyper import Hyper, abstract_hyper
from llama_fn.model.hyper import hyperparameters as hyperparameters  # for callers of the step
from llama_fn.model.transforms import accumulate, fold, named_scope, phase, repeated, value_and_grad
from llama_fn.tree import Leaf, Tree
from sharding import P, constrain

MAX_LOSS_SCALE = 2.0**32


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


@tree.dataclass
class TrainState:
    """Everything needed to continue, except the position in the data."""

    step: Leaf  # [] int64, iterations done
    params: llama.Params
    opt_state: OptState


@tree.dataclass
class Batch:
    """M microbatches: tokens and targets int64 [M, B, T], loss_mask float32 [M, B, T]; starts int64 [M, B, T] is where
    in its row each token's document begins, None where a row is read as one."""

    tokens: Leaf
    targets: Leaf
    loss_mask: Leaf
    starts: Leaf = None


def abstract_state(cfg: Config) -> TrainState:
    """The declaration of the state; its init gives iteration 0. UserError for a cfg that is no configuration."""
    check(cfg)
    params = llama.abstract_params(cfg.model)
    scale = cfg.optim.initial_loss_scale if cfg.model.compute_dtype == "fp16" else 1.0
    zero = ArrayInfo((), torch.float32)
    guard = Guard(ArrayInfo((), torch.float32, init=Init(value=scale)), zero, zero, zero)
    return TrainState(
        step=ArrayInfo((), torch.int64),
        params=params,
        opt_state=OptState(optim.adamw(cfg, params).init(params), guard),
    )


def abstract_batch(cfg: Config) -> Batch:
    """The declaration of a batch. UserError for a cfg that is no configuration."""
    check(cfg)
    m = cfg.data.microbatches
    shape = (m, cfg.data.global_batch_size // m, cfg.data.seq_len)
    axes = (None, "batch", "full_seq")
    ids = ArrayInfo(shape, torch.int64, axes, table="compute")
    mask = ArrayInfo(shape, torch.float32, axes, table="compute")
    return Batch(ids, ids, mask, ids if cfg.data.segments else None)


def abstract_arguments(cfg: Config) -> tuple[TrainState, Batch, Hyper]:
    """The declarations of what a training step takes: state, batch and hyper-parameters."""
    return abstract_state(cfg), abstract_batch(cfg), abstract_hyper(cfg)


def _microbatches(batch: Batch) -> list[Batch]:
    return [Batch(*parts) for parts in zip(*(k.unbind(field) for field in tree.leaves(batch)), strict=True)]


def _loss_sum(gathered: llama.Params, batch: Batch, cfg: Config) -> torch.Tensor:
    nll = llama.nll(gathered, batch.tokens, batch.targets, batch.starts, cfg=cfg.model)
    with named_scope("loss"):
        return k.weighted_sum(nll, batch.loss_mask)


def _tokens(batch: Batch) -> torch.Tensor:
    return torch.clamp(constrain(batch.loss_mask.sum(), P()), min=1.0)


def _gradients(cfg: Config) -> Callable[..., tuple[torch.Tensor, llama.Params]]:
    """(params in compute dtype, batch, cotangent) -> (loss summed over tokens, gradients in the moments' layout).

    Weights are gathered and gradients reduced once for all microbatches, whose gradients add up unreduced, or, where
    memory is shorter than bandwidth, those of the layers for each (optim.reduce_per_microbatch).
    """
    grad_fn = value_and_grad(lambda gathered, batch: _loss_sum(gathered, batch, cfg))
    dtype = {"fp32": torch.float32, "compute": None}[cfg.optim.reduce_dtype]
    dtype = None if cfg.model.compute_dtype == "fp64" else dtype

    infos = llama.abstract_params(cfg.model)

    def alone(params: llama.Params, part: Batch, cotangent: torch.Tensor) -> tuple[torch.Tensor, llama.Params]:
        loss, grads = grad_fn(weights.gather_layers(params, infos), part, cotangent=cotangent)
        with phase("backward"):
            return loss, weights.reduce_layers(grads, infos, dtype)

    def gradients(params: llama.Params, batch: Batch, cotangent: torch.Tensor) -> tuple[torch.Tensor, llama.Params]:
        parts, often = _microbatches(batch), cfg.optim.reduce_per_microbatch
        gathered = weights.gather_rest(params, infos)
        gathered = gathered if often else weights.gather_layers(gathered, infos)
        loss, grads = accumulate(alone if often else grad_fn, gathered, parts, cotangent=cotangent)
        with phase("backward"):
            grads = weights.reduce_rest(grads, infos, dtype)
            return loss, weights.stacked(grads if often else weights.reduce_layers(grads, infos, dtype))

    return gradients


def _cast(params: llama.Params, cfg: Config) -> llama.Params:
    with named_scope("cast"):
        return tree.map(lambda p: p.to(DTYPES[cfg.model.compute_dtype]), params)


def next_guard(guard: Guard, ok: torch.Tensor, numbers: torch.Tensor, hyper: Hyper, dtype: str) -> Guard:
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


def make_train_step(cfg: Config) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, Any]]]:
    """The step for cfg. An iteration whose loss or gradients are not finite leaves params and moments as they were.

    metrics, all float32 scalars: lm_loss (mean nats per unmasked token), grad_norm (before clipping),
    learning_rate, loss_scale (used in this step), skipped_iterations and nan_iterations (since iteration 0), and
    nonfinite_params: 1 where the update itself overflowed, which no later step mends. That is seen and not undone:
    holding the update back until every leaf is known would take a second copy of the state. With run.norms_every also
    norms: of the new parameters, the gradients before clipping and the updates, what optim.norms gives.
    UserError for a cfg that is no configuration.
    """
    check(cfg)
    infos = llama.abstract_params(cfg.model)
    optimizer = optim.adamw(cfg, infos)
    gradients = _gradients(cfg)

    def step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, dict[str, Any]]:
        guard = state.opt_state.guard
        compute_params = _cast(state.params, cfg)
        with named_scope("loss"):
            tokens = _tokens(batch)
            weight = guard.loss_scale / tokens
        loss_sum, grads = gradients(compute_params, batch, weight)
        with phase("optimizer"), named_scope("optimizer"):
            loss = constrain(loss_sum, P()) / tokens
            grads = tree.map(lambda g: upcast(g) / guard.loss_scale, grads)
            norm = optim.global_norm(grads)
            loss_ok = _finite(loss)
            ok = loss_ok & _finite(norm)
            old = (state.params, state.opt_state.chain)
            updates, chain = optimizer.update(grads, old[1], state.params, hyper=hyper, grad_norm=norm)
            params = optim.apply_updates(state.params, updates)
            params, chain = tree.map(lambda new, was: torch.where(ok, new, was), (params, chain), old)
            metrics: dict[str, Any] = {
                "lm_loss": loss,
                "grad_norm": norm,
                "learning_rate": optimizer.learning_rate(state.opt_state.chain, hyper),
                "loss_scale": guard.loss_scale,
            }
            if cfg.run.norms_every:
                of = {"param": params, "grad": grads, "update": updates}
                metrics["norms"] = {name: optim.norms(values, infos) for name, values in of.items()}
            params_ok = _all_finite(params)
            guard = next_guard(guard, ok, loss_ok & params_ok, hyper, cfg.model.compute_dtype)
            metrics |= {
                "skipped_iterations": guard.skipped,
                "nan_iterations": guard.nan,
                "nonfinite_params": torch.where(params_ok, torch.zeros_like(guard.nan), torch.ones_like(guard.nan)),
            }
            return TrainState(state.step + 1, params, OptState(chain, guard)), metrics

    return step


def make_eval_step(cfg: Config) -> Callable[[llama.Params, Batch], torch.Tensor]:
    """(params, batch) -> mean nats per unmasked token, a float32 scalar."""
    check(cfg)
    infos = llama.abstract_params(cfg.model)

    @repeated
    def microbatch_loss(gathered: llama.Params, part: Batch) -> torch.Tensor:
        return _loss_sum(gathered, part, cfg)

    def added(total: torch.Tensor, part: Batch, gathered: llama.Params) -> torch.Tensor:
        return total + microbatch_loss(gathered, part)

    def evaluation(params: llama.Params, batch: Batch) -> torch.Tensor:
        gathered = weights.gather(_cast(params, cfg), infos)
        parts = _microbatches(batch)
        scopes = [microbatch(i) for i in range(len(parts))]
        with named_scope(scopes[0]):
            total = microbatch_loss(gathered, parts[0])
        if len(parts) > 1:
            total = fold(added, total, parts[1:], (gathered,), scopes[1:])
        with named_scope("loss"):
            return constrain(total, P()) / _tokens(batch)

    return evaluation
