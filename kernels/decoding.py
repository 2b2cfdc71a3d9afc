"""What a model needs to read one token of each row: keys and values that were kept.

Letters as in attention.py; S is the length of the cache. `positions` [B] says where each row stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.registry import Factors, kernel
from kernels.rms_norm import upcast


def cached_reference(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """cache [B, S, K, H] with new [B, T, K, H] in the T places from each row's position on; what would lie behind the
    end is left out."""
    t = new.shape[1]
    ahead = torch.arange(cache.shape[1], device=cache.device)[None, :] - positions[:, None]
    here = ((ahead >= 0) & (ahead < t))[:, :, None, None]
    taken = ahead.clamp(0, t - 1)[:, :, None, None].expand(*cache.shape)
    return torch.where(here, new.expand(cache.shape) if t == 1 else new.gather(1, taken), cache)


def cached_attention_reference(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Attention of one query of each row, q [B, 1, N, H], over the keys up to its position, [B, S, K, H]."""
    b, _, n, h = q.shape
    kv = keys.shape[2]
    grouped, ks, vs = q.reshape(b, kv, n // kv, h), keys.transpose(1, 2), values.transpose(1, 2)
    scores = upcast(torch.matmul(grouped, ks.transpose(-1, -2))) * scale
    ahead = torch.arange(keys.shape[1], device=q.device)[None, :] > positions[:, None]
    weights = torch.softmax(scores.masked_fill(ahead[:, None, None, :], float("-inf")), -1).to(q.dtype)
    return torch.matmul(weights, vs).reshape(b, 1, n, h)


cached = kernel(
    name="cached",
    schema="(Tensor cache, Tensor new, Tensor positions) -> Tensor",
    reference=cached_reference,
    abstract=lambda cache, *_: torch.empty_like(cache, memory_format=torch.contiguous_format),
    factors=lambda *_: Factors("b s n h, b t n h, b -> b s n h", frozenset("st")),
)

cached_attention = kernel(
    name="cached_attention",
    schema="(Tensor q, Tensor keys, Tensor values, Tensor positions, float scale) -> Tensor",
    reference=cached_attention_reference,
    abstract=lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
    factors=lambda *_: Factors("b t n h, b s n h, b s n h, b -> b t n h", frozenset("tsh")),
    flops=lambda q, keys, *_: 4 * q.numel() * keys.shape[1],
)
