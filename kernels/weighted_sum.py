"""Sum of x w over every element: the loss over unmasked tokens."""

from __future__ import annotations

import torch

from kernels.registry import Factors, kernel


def _letters(x: torch.Tensor) -> str:
    return " ".join("btuv"[: x.dim()])


weighted_sum = kernel(
    name="weighted_sum",
    schema="(Tensor x, Tensor w) -> Tensor",
    reference=lambda x, w: (x * w).sum(),
    abstract=lambda x, w: torch.empty((), dtype=torch.result_type(x, w), device=x.device),
    factors=lambda x, w: Factors(f"{_letters(x)}, {_letters(x)} -> "),
    # As a product with the scalar, where autograd's own sum would expand the scalar to a shape that no mesh knows.
    vjp=lambda inputs, outputs, cts: (cts[0] * inputs[1], None),
)
