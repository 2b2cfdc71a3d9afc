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
from kernels.scope_names import microbatch
from llama_fn import tree
from llama_fn.config import Config
from llama_fn.config_checks import check
from llama_fn.model import llama, weights
from llama_fn.model.arrays import DTYPES, ArrayInfo
from llama_fn.model.hyper import Hyper, abstract_hyper
from llama_fn.model.hyper import hyperparameters as hyperparameters  # for callers of the step
from llama_fn.model.transforms import accumulate, fold, named_scope, phase, repeated, value_and_grad
from llama_fn.model.update import OptState, abstract_opt_state, make_update
from llama_fn.tree import Leaf
from sharding import P, constrain


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
    return TrainState(ArrayInfo((), torch.int64), llama.abstract_params(cfg.model), abstract_opt_state(cfg))


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


def make_train_step(cfg: Config) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, Any]]]:
    """The step for cfg, whose metrics are those of update.make_update. UserError for a cfg that is no configuration."""
    check(cfg)
    gradients, update = _gradients(cfg), make_update(cfg)

    def step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, dict[str, Any]]:
        compute_params = _cast(state.params, cfg)
        with named_scope("loss"):
            tokens = _tokens(batch)
            weight = state.opt_state.guard.loss_scale / tokens
        loss_sum, grads = gradients(compute_params, batch, weight)
        with phase("optimizer"), named_scope("optimizer"):
            params, opt_state, metrics = update(state.params, state.opt_state, loss_sum, tokens, grads, hyper)
            return TrainState(state.step + 1, params, opt_state), metrics

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
