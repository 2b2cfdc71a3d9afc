"""Next-token cross-entropy in nats, from logits, and fused with the head so that full logits never exist."""

from __future__ import annotations

import torch

from kernels.registry import Factors, kernel
from kernels.rms_norm import upcast

CHUNK_TOKENS = 512  # tokens whose logits exist at a time in the fused form


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


def token_blocks(x: torch.Tensor, targets: torch.Tensor) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Per block of CHUNK_TOKENS tokens: its place, its rows of x [B, T, D] as [tokens, D], and its targets."""
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    starts = range(0, rows.shape[0], CHUNK_TOKENS)
    spans = [slice(s, min(s + CHUNK_TOKENS, rows.shape[0])) for s in starts]
    return [(span, rows[span], flat[span]) for span in spans]


def head_cross_entropy_reference(
    x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As cross_entropy of logits = x [B, T, D] head^T [D, V], a block of tokens at a time."""
    parts = [cross_entropy_reference(rows @ head.t(), t) for _, rows, t in token_blocks(x, targets)]
    nll, lse = (torch.cat(column).reshape(targets.shape) for column in zip(*parts, strict=True))
    return nll, lse


def head_cross_entropy_bwd_reference(
    g: torch.Tensor, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [B, T, D] and dhead [V, D]; each block's logits are computed again (2 B T D V more operations).

    dhead is summed over blocks in float32 or wider and rounded once.
    """
    dx, dhead = [], torch.zeros_like(head, dtype=lse.dtype)
    g_flat, lse_flat = g.reshape(-1), lse.reshape(-1)
    for span, rows, t in token_blocks(x, targets):
        dlogits = cross_entropy_bwd_reference(g_flat[span], rows @ head.t(), t, lse_flat[span])
        dx.append(dlogits @ head)
        dhead = dhead + dlogits.t() @ rows
    return torch.cat(dx).reshape(x.shape), dhead.to(head.dtype)


head_cross_entropy_bwd = kernel(
    name="head_cross_entropy_bwd",
    schema="(Tensor g, Tensor x, Tensor head, Tensor targets, Tensor lse) -> (Tensor, Tensor)",
    reference=head_cross_entropy_bwd_reference,
    abstract=lambda g, x, head, targets, lse: (torch.empty_like(x), torch.empty_like(head)),
    factors=lambda *_: Factors("b t, b t d, v d, b t, b t -> b t d, v d", frozenset("vd")),
    flops=lambda g, x, head, *_: 6 * x.numel() * head.shape[0],
)

head_cross_entropy = kernel(
    name="head_cross_entropy",
    schema="(Tensor x, Tensor head, Tensor targets) -> (Tensor, Tensor)",
    reference=head_cross_entropy_reference,
    abstract=lambda x, head, targets: per_token(x, tuple(targets.shape)),
    factors=lambda *_: Factors("b t d, v d, b t -> b t, b t", frozenset("vd")),
    flops=lambda x, head, *_: 2 * x.numel() * head.shape[0],
    vjp=lambda inputs, outputs, cts: (*head_cross_entropy_bwd(cts[0], *inputs, outputs[1]), None),
)
