"""Embedding and cross-entropy on one device's rows of the vocabulary, and how the devices' parts come together.

`index` is the device's position along the vocabulary's mesh axes; it holds rows index * v .. (index + 1) * v. The full
logits never exist on a device: the maximum, the sum of exponentials and the target's logit are combined instead
(Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from kernels.cross_entropy import _per_token
from kernels.embedding import embedding_bwd_reference, embedding_reference
from kernels.registry import Factors, kernel
from kernels.rms_norm import wide


class Emit(Protocol):
    """What a sharded form of an op is written with: it emits ops of the per-device graph."""

    index: Any  # position along the sharded factor's axes

    def __call__(self, op: Any, *args: Any) -> Any: ...

    def all_reduce(self, x: Any, kind: str) -> Any: ...


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


def logits_max_reference(logits: torch.Tensor) -> torch.Tensor:
    """[B, T] in float32 or wider."""
    return wide(logits).amax(-1)


def logits_sums_reference(
    logits: torch.Tensor, targets: torch.Tensor, top: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """[2, B, T]: sum of exp(logits - top), and the target's logit less top where this part holds it, else 0."""
    z = wide(logits) - top[..., None]
    local, inside = _own(targets, index, logits.shape[-1])
    hit = z.gather(-1, local[..., None]).squeeze(-1)
    return torch.stack([torch.exp(z).sum(-1), torch.where(inside, hit, torch.zeros_like(hit))])


def cross_entropy_part_bwd_reference(
    g: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """dlogits [B, T, v] of the part; lse is that of the whole vocabulary."""
    p = torch.exp(wide(logits) - lse[..., None])
    local, inside = _own(targets, index, logits.shape[-1])
    vocab = torch.arange(logits.shape[-1], device=logits.device)
    hit = ((vocab == local[..., None]) & inside[..., None]).to(p.dtype)
    return (g[..., None] * (p - hit)).to(logits.dtype)


def _sums_abstract(logits, targets, top, index):
    like = _per_token(logits, tuple(targets.shape))[0]
    return like.new_empty((2, *targets.shape))


logits_max = kernel(
    name="logits_max",
    schema="(Tensor logits) -> Tensor",
    reference=logits_max_reference,
    abstract=lambda logits: _per_token(logits, tuple(logits.shape[:-1]))[0],
    factors=lambda *_: _NONE,
)
logits_sums = kernel(
    name="logits_sums",
    schema="(Tensor logits, Tensor targets, Tensor top, Tensor index) -> Tensor",
    reference=logits_sums_reference,
    abstract=_sums_abstract,
    factors=lambda *_: _NONE,
)
logits_merge = kernel(
    name="logits_merge",
    schema="(Tensor sums, Tensor top) -> (Tensor, Tensor)",
    reference=lambda sums, top: (sums[0].log() - sums[1], sums[0].log() + top),
    abstract=lambda sums, top: (torch.empty_like(top), torch.empty_like(top)),
    factors=lambda *_: _NONE,
)
cross_entropy_part_bwd = kernel(
    name="cross_entropy_part_bwd",
    schema="(Tensor g, Tensor logits, Tensor targets, Tensor lse, Tensor index) -> Tensor",
    reference=cross_entropy_part_bwd_reference,
    abstract=lambda g, logits, targets, lse, index: torch.empty_like(logits),
    factors=lambda *_: _NONE,
)


def embedding_sharded(emit: Emit, table: Any, tokens: Any) -> Any:
    """Unreduced over the vocabulary's axes: the annotation after it says where the sum goes."""
    return emit(embedding_part.op, table, tokens, emit.index)


def embedding_bwd_sharded(emit: Emit, dy: Any, tokens: Any, table: Any) -> Any:
    return emit(embedding_part_bwd.op, dy, tokens, emit.index, table)


def cross_entropy_sharded(emit: Emit, logits: Any, targets: Any) -> Any:
    top = emit.all_reduce(emit(logits_max.op, logits), "max")
    sums = emit.all_reduce(emit(logits_sums.op, logits, targets, top, emit.index), "sum")
    return emit(logits_merge.op, sums, top)


def cross_entropy_bwd_sharded(emit: Emit, g: Any, logits: Any, targets: Any, lse: Any) -> Any:
    return emit(cross_entropy_part_bwd.op, g, logits, targets, lse, emit.index)


SHARDED_VOCABULARY = {
    "embedding": embedding_sharded,
    "embedding_bwd": embedding_bwd_sharded,
    "cross_entropy": cross_entropy_sharded,
    "cross_entropy_bwd": cross_entropy_bwd_sharded,
}
