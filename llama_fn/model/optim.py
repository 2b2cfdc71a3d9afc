"""Optimizers as (init, update) pairs over trees, in the manner of optax. Schedules run inside the graph.

`update(updates, state, params, hyper=..., grad_norm=...)` returns (updates, state); only :func:`apply_updates` adds.
Numbers that may change from run to run come in `hyper` (hyper.py), as scalar tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from kernels.rms_norm import upcast
from llama_fn import tree
from llama_fn.config import Config
from llama_fn.model.arrays import ArrayInfo, Init
from llama_fn.model.hyper import Hyper
from llama_fn.tree import Leaf, Tree
from sharding import P, constrain, reshard_as

Schedule = Callable[[torch.Tensor, Hyper], torch.Tensor]


class Optimizer(NamedTuple):
    """`init` maps a tree of ArrayInfo to the abstract state; `update` is pure."""

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]


def _count() -> ArrayInfo:
    return ArrayInfo((), torch.float32, ())


def _stateless(fn: Callable[..., Tree]) -> Optimizer:
    def update(updates: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        return fn(updates, params, **extra), state

    return Optimizer(lambda params: (), update)


def chain(*parts: Optimizer) -> Optimizer:
    """Apply the parts in order; the state is the tuple of their states."""

    def update(updates: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        new = []
        for part, part_state in zip(parts, state, strict=True):
            updates, part_state = part.update(updates, part_state, params, **extra)
            new.append(part_state)
        return updates, tuple(new)

    return Optimizer(lambda params: tuple(part.init(params) for part in parts), update)


def global_norm(grads: Tree, infos: Tree) -> torch.Tensor:
    """Euclidean norm over every leaf, float32 scalar (float64 if a leaf is)."""
    # Each leaf's sum is finished over the mesh axes that shard that leaf, so nothing is counted twice.
    squares = [constrain(each.sum(), P()) for each in tree.leaves(tree.map(_squares, grads, infos))]
    return torch.sqrt(torch.stack(squares).sum())


def norms(values: Tree, infos: Tree) -> dict[str, torch.Tensor]:
    """By path the Euclidean norm of each leaf, in float32 or wider: [L] of a leaf that stacks L layers, else []."""
    squares = tree.map(_squares, values, infos)
    return tree.by_path(tree.map(lambda x: torch.sqrt(constrain(x, P(*[None] * x.dim()))), squares))


def _squares(x: torch.Tensor, info: ArrayInfo) -> torch.Tensor:
    """The sum of squares: [L] of a leaf that stacks L layers, so that global_norm and norms read it once, else []."""
    squares = torch.square(upcast(x))
    return squares.sum(list(range(1, x.dim()))) if info.axes[:1] == ("layers",) else squares.sum()


def clip_by_global_norm() -> Optimizer:
    """Scale all updates by min(1, clip / (norm + 1e-6)) (Pascanu et al. 2013, with torch's epsilon)."""

    def clip(updates: Tree, params: Tree, hyper: Hyper, grad_norm: torch.Tensor, **extra: Any) -> Tree:
        factor = torch.clamp(hyper.clip / (grad_norm + 1e-6), max=1.0)
        return tree.map(lambda g: g * factor, updates)

    return _stateless(clip)


class AdamState(NamedTuple):
    """First moment, second moment (trees like params) and the number of updates made."""

    mu: Tree
    nu: Tree
    count: Leaf


def scale_by_adam() -> Optimizer:
    """Adam's direction with bias correction (Kingma and Ba 2015, algorithm 1)."""

    def init(params: Tree) -> AdamState:
        zeros = tree.map(lambda info: replace(info, init=Init(), table="moments"), params)
        return AdamState(zeros, zeros, _count())

    def update(updates: Tree, state: AdamState, params: Tree, hyper: Hyper, **extra: Any) -> tuple[Tree, AdamState]:
        h, count = hyper, state.count + 1
        mu = tree.map(lambda m, g: h.b1 * m + h.b1_rest * g, state.mu, updates)
        nu = tree.map(lambda v, g: h.b2 * v + h.b2_rest * (g * g), state.nu, updates)
        correct1, correct2 = 1 - torch.exp(count * h.b1_log), 1 - torch.exp(count * h.b2_log)
        direction = tree.map(lambda m, v: (m / correct1) / (torch.sqrt(v / correct2) + h.eps), mu, nu)
        return direction, AdamState(mu, nu, count)

    return Optimizer(init, update)


def add_decayed_weights(mask: Tree) -> Optimizer:
    """Decoupled weight decay (Loshchilov and Hutter 2019) where `mask`, a tree of bool like params, is True."""

    def decay(updates: Tree, params: Tree, hyper: Hyper, **extra: Any) -> Tree:
        def one(u: torch.Tensor, p: torch.Tensor, decayed: bool) -> torch.Tensor:
            return u + hyper.weight_decay * reshard_as(p, u) if decayed else u

        return tree.map(one, updates, params, mask)

    return _stateless(decay)


def matrices(params: Tree) -> Tree:
    """The mask of what weight decay applies to: every leaf of ArrayInfo but vectors, stacked or not (the norms), and
    taken apart into heads or not (the biases)."""
    return tree.map(lambda info: len([axis for axis in info.axes if axis not in ("layers", "head_dim")]) > 1, params)


def scale_by_schedule(schedule: Schedule) -> Optimizer:
    """Multiply by -schedule(count), count being 1 in the first update."""

    def update(updates: Tree, state: Tree, params: Tree, hyper: Hyper, **extra: Any) -> tuple[Tree, Tree]:
        count = state + 1
        rate = schedule(count, hyper)
        return tree.map(lambda u: -rate * u, updates), count

    return Optimizer(lambda params: _count(), update)


def warmup_decay(kind: str) -> Schedule:
    """Linear warmup to lr over warmup_steps, then `kind`, cosine or linear, to min_lr at decay_steps, then constant.
    Of kind constant it stays at lr.

    Count i is the i-th update, so it uses lr * i / warmup_steps: the value that Megatron logs at iteration i.
    """

    def schedule(count: torch.Tensor, hyper: Hyper) -> torch.Tensor:
        h = hyper
        if kind == "constant":
            rate = h.lr
        else:
            done = torch.clamp((count - h.warmup_steps) / h.decay_steps, 0.0, 1.0)
            left = 0.5 * (1 + torch.cos(math.pi * done)) if kind == "cosine" else 1 - done
            rate = h.min_lr + (h.lr - h.min_lr) * left
        return torch.where(count < h.warmup_steps, count * h.warmup_lr, rate)

    return schedule


class AdamW(NamedTuple):
    """An optimizer, and the learning rate of the next update by its state, for the metrics: a float32 scalar."""

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]
    learning_rate: Callable[[Tree, Hyper], torch.Tensor]


def adamw(cfg: Config, params: Tree) -> AdamW:
    """The optimizer of a training run on parameters declared as `params`: clip, Adam, weight decay, schedule."""
    schedule = warmup_decay(cfg.optim.schedule)
    parts = clip_by_global_norm(), scale_by_adam(), add_decayed_weights(matrices(params)), scale_by_schedule(schedule)
    whole = chain(*parts)

    def learning_rate(state: Tree, hyper: Hyper) -> torch.Tensor:
        *_, updates_made = state  # scale_by_schedule is the chain's last part, and its state is this count
        return schedule(updates_made + 1, hyper).to(updates_made.dtype)

    return AdamW(whole.init, whole.update, learning_rate)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, each leaf in the parameter's dtype and sharding."""
    return tree.map(lambda p, u: p + reshard_as(u.to(p.dtype), p), params, updates)
