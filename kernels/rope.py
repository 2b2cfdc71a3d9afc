"""Rotary position embedding (Su et al. 2021), in the rotate-half order of the published LLaMA checkpoints on HF."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.registry import Argument, Factors, kernel
from kernels.rms_norm import upcast


def rope_table_reference(
    like: Tensor, seq_len: int, head_dim: int, theta: float, scaling: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, H/2] in float32 for positions 0..T-1; `like` only tells the device.

    `scaling`, of Llama 3.1 (Dubey et al. 2024, as published with its weights): factor, low and high frequency and the
    length L before. Frequencies that turn less than `low` times within L are divided by the factor, those that turn
    more than `high` times stay, and between these it goes linearly from one to the other.
    """
    exponent = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    inverse_frequency = 1.0 / theta**exponent
    if scaling:
        factor, low, high, length = scaling
        turns = inverse_frequency * (length / (2 * math.pi))
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        inverse_frequency = inverse_frequency * (kept + (1.0 - kept) / factor)
    position = torch.arange(seq_len, device=like.device, dtype=torch.float32)
    angle = position[:, None] * inverse_frequency[None, :]
    return angle.cos(), angle.sin()


def _table_abstract(
    like: Tensor, seq_len: int, head_dim: int, theta: float, scaling: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    if head_dim % 2:
        raise ValueError(f"rope needs an even head_dim, got {head_dim}")
    shape = (seq_len, head_dim // 2)
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)


rope_table = kernel(
    name="rope_table",
    schema="(Tensor like, int seq_len, int head_dim, float theta, float[] scaling=[]) -> (Tensor, Tensor)",
    reference=rope_table_reference,
    abstract=_table_abstract,
    factors=lambda *_: Factors("_ -> t r, t r"),
)


def _angles(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """[T, 1, R], or [B, T, 1, R] for positions [B, T]."""
    if positions is not None:
        cos, sin = (torch.nn.functional.embedding(positions, part) for part in (cos, sin))
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, positions: Tensor | None = None) -> Tensor:
    """x [B, T, N, H] with each pair (x[i], x[i + H/2]) turned by its position's angle (`inverse`: turned back).

    Positions are 0..T-1 in every row, or `positions` [B, T], rows of the table.
    """
    half = x.shape[-1] // 2
    first, second = upcast(x[..., :half]), upcast(x[..., half:])
    cos, sin = _angles(cos, sin, positions)
    if inverse:
        sin = -sin
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(x.dtype) for part in turned], dim=-1)


def rope_npu(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, positions: Tensor | None = None) -> Tensor:
    """RotaryMul wants cos and sin as upcast as x and in its dtype, so in bf16 the angles are rounded to bf16."""
    if positions is not None:
        cos, sin = (torch.nn.functional.embedding(positions, part) for part in (cos, sin))
    else:
        cos, sin = cos[None], sin[None]
    wide_cos, wide_sin = (torch.cat([part, part], -1)[:, :, None, :].to(x.dtype) for part in (cos, sin))
    return torch.ops.npu.npu_rotary_mul(x, wide_cos, -wide_sin if inverse else wide_sin)


def _vjp(inputs: Sequence[Argument], outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Argument, ...]:
    _, cos, sin, inverse, *positions = inputs
    return rope(cotangents[0], cos, sin, not inverse, *positions), None, None, None, *[None for _ in positions]


def _factors(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, positions: Tensor | None = None) -> Factors:
    if positions is None:
        return Factors("b t n h, t r, t r -> b t n h", frozenset("hr"))
    return Factors("b t n h, s r, s r, b t -> b t n h", frozenset("hrs"))


rope = kernel(
    name="rope",
    schema="(Tensor x, Tensor cos, Tensor sin, bool inverse, Tensor? positions=None) -> Tensor",
    reference=rope_reference,
    abstract=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    factors=_factors,
    vjp=_vjp,
    npu=rope_npu,
)
