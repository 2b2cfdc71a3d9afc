"""A bias for every head, the same for all tokens (Qwen 2's queries, keys and values have one)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.registry import Argument, Factors, kernel
from kernels.rms_norm import upcast


def bias_reference(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x [B, T, N, H] plus b [N, H], in x's dtype."""
    return x + b


def _vjp(
    inputs: Sequence[Argument], outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
) -> tuple[Argument, ...]:
    """The bias's gradient is summed over tokens in float32 or wider. Broadcasting's own would keep dimensions of size 1
    and view them away, which no sharding rule says."""
    (dy,), b = cotangents, inputs[1]
    assert isinstance(b, torch.Tensor)
    return dy, upcast(dy).sum((0, 1)).to(b.dtype)


bias = kernel(
    name="bias",
    schema="(Tensor x, Tensor b) -> Tensor",
    reference=bias_reference,
    abstract=lambda x, b: torch.empty_like(x, memory_format=torch.contiguous_format),
    factors=lambda *_: Factors("b t n h, n h -> b t n h"),
    vjp=_vjp,
)
