"""RMSNorm (Zhang and Sennrich 2019, eq. 4): x / sqrt(mean(x^2) + eps) * weight, computed in float32 or wider."""

from __future__ import annotations

import torch

from kernels.registry import Factors, kernel


def upcast(x: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything narrower is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y [..., D] in x's dtype, and rstd [..., 1] in the computing dtype for the backward."""
    x_wide = upcast(x)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rstd).to(x.dtype) * weight, rstd


def _abstract(x, weight, eps):
    return torch.empty_like(x), upcast(x[..., :1]).new_empty((*x.shape[:-1], 1))


def rms_norm_bwd_reference(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [..., D] and dweight [D]. With n = x * rstd: dx = rstd * (dy w - n mean(dy w n))."""
    n = upcast(x) * rstd
    g = upcast(dy) * upcast(weight)
    dx = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    dweight = (upcast(dy) * n).sum(list(range(x.dim() - 1)))
    return dx.to(x.dtype), dweight.to(weight.dtype)


def rms_norm_npu(x, weight, eps):
    """RmsNorm multiplies by the weight before it rounds, where the reference rounds first."""
    return torch.ops.npu.npu_rms_norm(x, weight, eps)


def rms_norm_bwd_npu(dy, x, weight, rstd):
    dx, dweight = torch.ops.npu.npu_rms_norm_backward(dy, x, weight, rstd)
    return dx, dweight.to(weight.dtype)


def _rows(x: torch.Tensor) -> str:
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


def _vjp(inputs, outputs, cotangents):
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
