"""Next-token cross-entropy in nats, from logits."""

from __future__ import annotations

import torch

from kernels.registry import Factors, kernel
from kernels.rms_norm import upcast


def cross_entropy_reference(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and log-sum-exp, both [B, T] float32 (float64 for float64 logits), from logits [B, T, V], targets [B, T]."""
    z = upcast(logits)
    lse = torch.logsumexp(z, dim=-1)
    return lse - z.gather(-1, targets[..., None]).squeeze(-1), lse


def cross_entropy_bwd_reference(
    g: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """dlogits [B, T, V] = g (softmax(logits) - onehot(targets)), g [B, T] being the cotangent of nll."""
    p = torch.exp(upcast(logits) - lse[..., None])
    vocab = torch.arange(logits.shape[-1], device=logits.device)
    hit = (vocab == targets[..., None]).to(p.dtype)
    return (g[..., None] * (p - hit)).to(logits.dtype)


cross_entropy_bwd = kernel(
    name="cross_entropy_bwd",
    schema="(Tensor g, Tensor logits, Tensor targets, Tensor lse) -> Tensor",
    reference=cross_entropy_bwd_reference,
    abstract=lambda g, logits, targets, lse: torch.empty_like(logits),
    factors=lambda *_: Factors("b t, b t v, b t, b t -> b t v", frozenset("v")),
)


def per_token(like: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of nll and log-sum-exp: two float32 (float64 for a float64 `like`) values per token."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)


cross_entropy = kernel(
    name="cross_entropy",
    schema="(Tensor logits, Tensor targets) -> (Tensor, Tensor)",
    reference=cross_entropy_reference,
    abstract=lambda logits, targets: per_token(logits, tuple(targets.shape)),
    factors=lambda *_: Factors("b t v, b t -> b t, b t", frozenset("v")),
    vjp=lambda inputs, outputs, cts: (cross_entropy_bwd(cts[0], *inputs, outputs[1]), None),
)
