"""Cross-entropy fused with the head, in blocks of tokens, so that the logits of all never exist at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernels.cross_entropy import cross_entropy_bwd_reference, cross_entropy_reference, per_token
from kernels.einsum import einsum_npu, einsum_reference
from kernels.registry import Factors, kernel
from kernels.rms_norm import upcast

# A block has at least so many tokens, which keeps its products fast, and there are at most so many blocks, which keeps
# graphs small.
FEWEST_TOKENS, MOST_BLOCKS = 512, 8

# The products, of rows [tokens, D] and a head [V, D], as an einsum's form computes them.
Product = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
LOGITS, DX, DHEAD = "td,vd->tv", "tv,vd->td", "tv,td->vd"


def block_size(targets: torch.Tensor) -> int:
    """Tokens of a block, whose logits exist at a time."""
    return max(FEWEST_TOKENS, -(-targets.numel() // MOST_BLOCKS))


def token_blocks(x: torch.Tensor, *of_tokens: torch.Tensor, size: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Per block of `size` tokens, or block_size: rows of x [B, T, D] as [tokens, D], and its part of each [B, T]."""
    flat = [x.reshape(-1, x.shape[-1]), *(each.reshape(-1) for each in of_tokens)]
    count, size = flat[0].shape[0], size or block_size(of_tokens[0])
    if size >= count:  # without slices, which compilers would have to find idle
        return [tuple(flat)]
    return [tuple(each[start : start + size] for each in flat) for start in range(0, count, size)]


def logits_bytes(x: torch.Tensor, head: torch.Tensor, size: int) -> int:
    """Bytes of the logits of a block of `size` tokens of x [B, T, D]."""
    return min(size, x.numel() // x.shape[-1]) * head.shape[0] * x.element_size()


def head_cross_entropy_reference(
    x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, product: Product = einsum_reference
) -> tuple[torch.Tensor, torch.Tensor]:
    """As cross_entropy of logits = x [B, T, D] head^T [D, V], a block of tokens at a time."""
    parts = [cross_entropy_reference(product(LOGITS, rows, head), t) for rows, t in token_blocks(x, targets)]
    nll, lse = (torch.cat(column).reshape(targets.shape) for column in zip(*parts, strict=True))
    return nll, lse


def added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """The sum in float32 or wider; the first part as it is."""
    return part if total is None else upcast(total) + part


def head_cross_entropy_bwd_reference(
    g: torch.Tensor, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor,
    product: Product = einsum_reference,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx [B, T, D] and dhead [V, D]; each block's logits are computed again (2 B T D V more operations).

    dhead is summed over blocks in float32 or wider and rounded once.
    """
    dx: list[torch.Tensor] = []
    dhead: torch.Tensor | None = None
    for rows, t, of_loss, sums in token_blocks(x, targets, g, lse):
        dlogits = cross_entropy_bwd_reference(of_loss, product(LOGITS, rows, head), t, sums)
        dx.append(product(DX, dlogits, head))
        dhead = added(dhead, product(DHEAD, dlogits, rows))
    assert dhead is not None, "no tokens"
    return torch.cat(dx).reshape(x.shape), dhead.to(head.dtype)


head_cross_entropy_bwd = kernel(
    name="head_cross_entropy_bwd",
    schema="(Tensor g, Tensor x, Tensor head, Tensor targets, Tensor lse) -> (Tensor, Tensor)",
    reference=head_cross_entropy_bwd_reference,
    npu=partial(head_cross_entropy_bwd_reference, product=einsum_npu),
    abstract=lambda g, x, head, targets, lse: (torch.empty_like(x), torch.empty_like(head)),
    factors=lambda *_: Factors("b t, b t d, v d, b t, b t -> b t d, v d", frozenset("vd")),
    flops=lambda g, x, head, *_: 6 * x.numel() * head.shape[0],
    scratch=lambda g, x, head, targets, *_: 2 * logits_bytes(x, head, block_size(targets)),  # and their gradient's
)

head_cross_entropy = kernel(
    name="head_cross_entropy",
    schema="(Tensor x, Tensor head, Tensor targets) -> (Tensor, Tensor)",
    reference=head_cross_entropy_reference,
    npu=partial(head_cross_entropy_reference, product=einsum_npu),
    abstract=lambda x, head, targets: per_token(x, tuple(targets.shape)),
    factors=lambda *_: Factors("b t d, v d, b t -> b t, b t", frozenset("vd")),
    flops=lambda x, head, *_: 2 * x.numel() * head.shape[0],
    scratch=lambda x, head, targets, *_: logits_bytes(x, head, block_size(targets)),
    vjp=lambda inputs, outputs, cts: (*head_cross_entropy_bwd(cts[0], *inputs, outputs[1]), None),
)
