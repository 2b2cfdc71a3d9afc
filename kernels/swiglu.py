"""SwiGLU (Shazeer 2020): silu(gate) * up."""

from __future__ import annotations

import torch

from kernels.registry import Factors, kernel
from kernels.rms_norm import upcast


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[B, T, F]; computed in float32 or wider, returned in the operands' dtype."""
    g = upcast(gate)
    return (g * torch.sigmoid(g) * upcast(up)).to(gate.dtype)


def swiglu_bwd_reference(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate = dy up s (1 + g (1 - s)) and dup = dy g s, with s = sigmoid(g)."""
    g, dy_wide = upcast(gate), upcast(dy)
    s = torch.sigmoid(g)
    dgate = dy_wide * upcast(up) * s * (1 + g * (1 - s))
    return dgate.to(gate.dtype), (dy_wide * g * s).to(up.dtype)


def swiglu_npu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGlu of gate and up side by side."""
    return torch.ops.npu.npu_swiglu(torch.cat([gate, up], -1), -1)


def swiglu_bwd_npu(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGluGrad, taken apart into dgate and dup."""
    both = torch.ops.npu.npu_swiglu_backward(dy, torch.cat([gate, up], -1), -1)
    dgate, dup = both.split(gate.shape[-1], -1)
    return dgate, dup


swiglu_bwd = kernel(
    name="swiglu_bwd",
    schema="(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    reference=swiglu_bwd_reference,
    abstract=lambda dy, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
    factors=lambda *_: Factors("b t f, b t f, b t f -> b t f, b t f"),
    npu=swiglu_bwd_npu,
)

swiglu = kernel(
    name="swiglu",
    schema="(Tensor gate, Tensor up) -> Tensor",
    reference=swiglu_reference,
    abstract=lambda gate, up: torch.empty_like(gate),
    factors=lambda *_: Factors("b t f, b t f -> b t f"),
    vjp=lambda inputs, outputs, cotangents: swiglu_bwd(cotangents[0], *inputs),
    npu=swiglu_npu,
)
