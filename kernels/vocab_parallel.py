"""Embedding and cross-entropy on one device's rows of the vocabulary, and how the devices' parts come together.

`index` is the device's position along the vocabulary's mesh axes; it holds rows index * v .. (index + 1) * v. The full
logits never exist on a device: the log-sum-exp of each part and the target's logit are combined instead (after Shoeybi
et al. 2019, section 3).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch

from kernels.cross_entropy import cross_entropy_bwd, per_token
from kernels.einsum import einsum_npu, einsum_reference
from kernels.embedding import embedding_bwd_reference, embedding_reference
from kernels.head_cross_entropy import (
    LOGITS,
    Product,
    head_cross_entropy,
    head_cross_entropy_bwd,
    head_cross_entropy_bwd_reference,
    token_blocks,
)
from kernels.registry import Factors, kernel
from kernels.rms_norm import upcast

Value = Any  # what an Emit works on: a node of the graph that is being made, or a tensor


class Emit(Protocol):
    """What a sharded form of an op is written with: it emits ops of the per-device graph."""

    index: Value  # position along the sharded factor's axes

    def __call__(self, op: Any, *args: Value) -> Value:
        """The results of an op on this device's parts."""
        ...

    def all_reduce(self, x: Value, kind: str) -> Value:
        """x summed (or its maximum, by `kind`) over the devices that share the vocabulary."""
        ...


def _own(ids: torch.Tensor, index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row within the device's part, and whether the id is one of them (else the row is 0)."""
    local = ids - index * rows
    inside = (local >= 0) & (local < rows)
    return torch.where(inside, local, torch.zeros_like(local)), inside


def embedding_part_reference(table: torch.Tensor, tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, T, D]: rows of the tokens that this part [v, D] holds, zero for the others."""
    local, inside = _own(tokens, index, table.shape[0])
    return embedding_reference(table, local) * inside[..., None].to(table.dtype)


def embedding_part_bwd_reference(
    dy: torch.Tensor, tokens: torch.Tensor, index: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """[v, D]: gradient of the part, of which only the shape counts."""
    local, inside = _own(tokens, index, table.shape[0])
    return embedding_bwd_reference(dy * inside[..., None].to(dy.dtype), local, table)


_NONE = Factors(" -> ")

embedding_part = kernel(
    name="embedding_part",
    schema="(Tensor table, Tensor tokens, Tensor index) -> Tensor",
    reference=embedding_part_reference,
    abstract=lambda table, tokens, index: table.new_empty((*tokens.shape, table.shape[1])),
    factors=lambda *_: _NONE,
)
embedding_part_bwd = kernel(
    name="embedding_part_bwd",
    schema="(Tensor dy, Tensor tokens, Tensor index, Tensor table) -> Tensor",
    reference=embedding_part_bwd_reference,
    abstract=lambda dy, tokens, index, table: dy.new_empty((table.shape[0], dy.shape[-1])),
    factors=lambda *_: _NONE,
    opaque=True,  # as embedding_bwd
)


def logits_part_reference(logits: torch.Tensor, targets: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[2, B, T] in float32 or wider: log-sum-exp over this part, and the target's logit where it holds it, else 0."""
    z = upcast(logits)
    local, inside = _own(targets, index, logits.shape[-1])
    hit = z.gather(-1, local[..., None]).squeeze(-1)
    return torch.stack([torch.logsumexp(z, -1), torch.where(inside, hit, torch.zeros_like(hit))])


def head_part_reference(
    x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, index: torch.Tensor,
    product: Product = einsum_reference,
) -> torch.Tensor:  # fmt: skip
    """As logits_part of x head^T, a block of tokens at a time."""
    blocks = token_blocks(x, targets)
    parts = [logits_part_reference(product(LOGITS, rows, head), t, index) for rows, t in blocks]
    return torch.cat(parts, 1).reshape(2, *targets.shape)


def part_sums_reference(part: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """[2, B, T]: what the devices add up, with the largest log-sum-exp `top` of theirs taken out."""
    return torch.stack([torch.exp(part[0] - top), part[1]])


def _two_per_token(like: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    nll, _ = per_token(like, tuple(targets.shape))
    return nll.new_empty((2, *targets.shape))


logits_part = kernel(
    name="logits_part",
    schema="(Tensor logits, Tensor targets, Tensor index) -> Tensor",
    reference=logits_part_reference,
    abstract=lambda logits, targets, index: _two_per_token(logits, targets),
    factors=lambda *_: _NONE,
)
head_part = kernel(
    name="head_part",
    schema="(Tensor x, Tensor head, Tensor targets, Tensor index) -> Tensor",
    reference=head_part_reference,
    npu=partial(head_part_reference, product=einsum_npu),
    abstract=lambda x, head, targets, index: _two_per_token(x, targets),
    factors=lambda *_: _NONE,
    flops=head_cross_entropy.flops,
    scratch=head_cross_entropy.scratch,
)
part_max = kernel(
    name="part_max",
    schema="(Tensor part) -> Tensor",
    reference=lambda part: part[0].clone(),
    abstract=lambda part: part.new_empty(part.shape[1:]),
    factors=lambda *_: _NONE,
)
part_sums = kernel(
    name="part_sums",
    schema="(Tensor part, Tensor top) -> Tensor",
    reference=part_sums_reference,
    abstract=lambda part, top: torch.empty_like(part),
    factors=lambda *_: _NONE,
)
part_merge = kernel(
    name="part_merge",
    schema="(Tensor sums, Tensor top) -> (Tensor, Tensor)",
    reference=lambda sums, top: (sums[0].log() + top - sums[1], sums[0].log() + top),
    abstract=lambda sums, top: (torch.empty_like(top), torch.empty_like(top)),
    factors=lambda *_: _NONE,
)


def _head_part_bwd(
    g: torch.Tensor, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor,
    index: torch.Tensor, product: Product = einsum_reference,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return head_cross_entropy_bwd_reference(g, x, head, targets - index * head.shape[0], lse, product)


# An id outside of the part equals no row of it, so that the whole vocabulary's formula serves with shifted ids.
cross_entropy_part_bwd = kernel(
    name="cross_entropy_part_bwd",
    schema="(Tensor g, Tensor logits, Tensor targets, Tensor lse, Tensor index) -> Tensor",
    reference=lambda g, logits, targets, lse, index: cross_entropy_bwd.reference(
        g, logits, targets - index * logits.shape[-1], lse
    ),
    abstract=lambda g, logits, targets, lse, index: torch.empty_like(logits),
    factors=lambda *_: _NONE,
)
head_part_bwd = kernel(
    name="head_part_bwd",
    schema="(Tensor g, Tensor x, Tensor head, Tensor targets, Tensor lse, Tensor index) -> (Tensor, Tensor)",
    reference=_head_part_bwd,
    npu=partial(_head_part_bwd, product=einsum_npu),
    abstract=lambda g, x, head, targets, lse, index: (torch.empty_like(x), torch.empty_like(head)),
    factors=lambda *_: _NONE,
    flops=head_cross_entropy_bwd.flops,
    scratch=head_cross_entropy_bwd.scratch,
)


def embedding_sharded(emit: Emit, table: Value, tokens: Value) -> Value:
    """Unreduced over the vocabulary's axes: the annotation after it says where the sum goes."""
    return emit(embedding_part.op, table, tokens, emit.index)


def embedding_bwd_sharded(emit: Emit, dy: Value, tokens: Value, table: Value) -> Value:
    """The gradient of this device's rows of the table."""
    return emit(embedding_part_bwd.op, dy, tokens, emit.index, table)


def _merged(emit: Emit, part: Value) -> Value:
    top = emit.all_reduce(emit(part_max.op, part), "max")
    return emit(part_merge.op, emit.all_reduce(emit(part_sums.op, part, top), "sum"), top)


def cross_entropy_sharded(emit: Emit, logits: Value, targets: Value) -> Value:
    """nll and log-sum-exp [B, T] from logits [B, T, V / n], merged over devices."""
    return _merged(emit, emit(logits_part.op, logits, targets, emit.index))


def cross_entropy_bwd_sharded(emit: Emit, g: Value, logits: Value, targets: Value, lse: Value) -> Value:
    """dlogits of this device's part of the vocabulary; sends nothing."""
    return emit(cross_entropy_part_bwd.op, g, logits, targets, lse, emit.index)


def head_cross_entropy_sharded(emit: Emit, x: Value, head: Value, targets: Value) -> Value:
    """As cross_entropy_sharded, from this device's rows of the head, in blocks of tokens."""
    return _merged(emit, emit(head_part.op, x, head, targets, emit.index))


def head_cross_entropy_bwd_sharded(emit: Emit, g: Value, x: Value, head: Value, targets: Value, lse: Value) -> Value:
    """dx is unreduced over the vocabulary's axes."""
    return emit(head_part_bwd.op, g, x, head, targets, lse, emit.index)


SHARDED_VOCABULARY = {
    "embedding": embedding_sharded,
    "embedding_bwd": embedding_bwd_sharded,
    "cross_entropy": cross_entropy_sharded,
    "cross_entropy_bwd": cross_entropy_bwd_sharded,
    "head_cross_entropy": head_cross_entropy_sharded,
    "head_cross_entropy_bwd": head_cross_entropy_bwd_sharded,
}
FINISHED = ("cross_entropy", "head_cross_entropy")  # their own collectives finish the sums over the vocabulary
