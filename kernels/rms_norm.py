"""RMSNorm (Zhang and Sennrich 2019, eq. 4): x / sqrt(mean(x^2) + eps) * weight, computed in float32 or wider."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.registry import Argument, Factors, kernel


def upcast(x: Tensor) -> Tensor:
    """float64 stays, everything narrower is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., D] in x's dtype, and rstd [..., 1] in the computing dtype for the backward."""
    x_wide = upcast(x)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rstd).to(x.dtype) * weight, rstd


def _abstract(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), upcast(x[..., :1]).new_empty((*x.shape[:-1], 1))


def rms_norm_bwd_reference(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx [..., D] and dweight [D]. With n = x * rstd: dx = rstd * (dy w - n mean(dy w n))."""
    n = upcast(x) * rstd
    g = upcast(dy) * upcast(weight)
    dx = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    dweight = (upcast(dy) * n).sum(list(range(x.dim() - 1)))
    return dx.to(x.dtype), dweight.to(weight.dtype)


def rms_norm_npu(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RmsNorm multiplies by the weight before it rounds, where the reference rounds first."""
    y, rstd = torch.ops.npu.npu_rms_norm(x, weight, eps)
    return y, rstd


def rms_norm_bwd_npu(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """RmsNormGrad; dweight comes back in float32 and is rounded to the weight's dtype."""
    dx, dweight = torch.ops.npu.npu_rms_norm_backward(dy, x, weight, rstd)
    return dx, dweight.to(weight.dtype)


def _rows(x: Tensor) -> str:
    return " ".join("btuv"[: x.dim() - 1])


rms_norm_bwd = kernel(
    name="rms_norm_bwd",
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    reference=rms_norm_bwd_reference,
    abstract=lambda dy, x, weight, rstd: (torch.empty_like(x), torch.empty_like(weight)),
    factors=lambda dy, x, weight, rstd: Factors(
        f"{_rows(x)} d, {_rows(x)} d, d, {_rows(x)} o -> {_rows(x)} d, d", frozenset("do")
    ),
    npu=rms_norm_bwd_npu,
)


def _vjp(inputs: Sequence[Argument], outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Argument, ...]:
    x, weight, _ = inputs
    dx, dweight = rms_norm_bwd(cotangents[0], x, weight, outputs[1])
    return dx, dweight, None


rms_norm = kernel(
    name="rms_norm",
    schema="(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=rms_norm_reference,
    abstract=_abstract,
    factors=lambda x, weight, eps: Factors(f"{_rows(x)} d, d -> {_rows(x)} d, {_rows(x)} o", frozenset("do")),
    vjp=_vjp,
    npu=rms_norm_npu,
)
