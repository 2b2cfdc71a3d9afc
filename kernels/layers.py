"""Stacked layer parameters taken apart and put together, with the transposes of both.

These are plain aten ops; the wrappers exist so that the gradient of an `unbind` is one `stack` that carries the
scope of the layers, instead of a chain of zero-filled slices from the autograd engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels import scope
from kernels.registry import Argument, differentiable


def _unbind_op(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ops.aten.unbind.int(x, 0))


def _unbind_vjp(
    inputs: Sequence[Argument], outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor]:
    (x,) = inputs
    whole = [torch.zeros_like(x[0]) if ct is None else ct for ct in cotangents]
    return (torch.ops.aten.stack.default(whole, 0),)


def _stack_op(*parts: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.stack.default(list(parts), 0)


_Unbind = differentiable("unbind", _unbind_op, _unbind_vjp)
_Stack = differentiable("stack", _stack_op, lambda inputs, outputs, cts: _unbind_op(cts[0]))


def unbind(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [L, ...] -> L tensors [...]: do it once at the top of the model, indexing per layer is quadratic in L."""
    with scope.source_line():
        return _Unbind.apply(x)


def stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """L tensors [...] -> [L, ...]."""
    with scope.source_line():
        return _Stack.apply(*parts)
