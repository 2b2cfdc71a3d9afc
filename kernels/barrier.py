"""barrier(x, after): x itself, but only once `after` is there.

What recomputes a value in the backward reads its operands through one (JAX's optimization_barrier). So it can neither
be started earlier, when the memory it saves is not free yet, nor be taken for the op in the forward that it repeats.
"""

from __future__ import annotations

import torch

from kernels.registry import Factors, kernel

barrier = kernel(
    name="barrier",
    schema="(Tensor(a) x, Tensor after) -> Tensor(a)",
    reference=lambda x, after: x,
    abstract=lambda x, after: torch.empty_like(x),
    factors=lambda *_: Factors(" -> "),
    opaque=True,
)
