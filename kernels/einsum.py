"""Two-operand einsum: every matrix product of the model, with heads kept as their own dimension."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch

from kernels.registry import Argument, Factors, kernel


@cache
def parse(equation: str) -> tuple[str, str, str]:
    """Letters of both operands and the result; ValueError unless each letter stands in at least two of the three."""
    try:
        operands, out = equation.replace(" ", "").split("->")
        a, b = operands.split(",")
    except ValueError:
        raise ValueError(f"einsum equation {equation!r} is not of the form 'ab,bc->ac'") from None
    for term in (a, b, out):
        if len(set(term)) != len(term) or not term.isalpha():
            raise ValueError(f"einsum equation {equation!r}: term {term!r} needs distinct letters, one per dimension")
    for letter in set(a + b + out):
        if (letter in a) + (letter in b) + (letter in out) < 2:
            raise ValueError(
                f"einsum equation {equation!r}: {letter!r} stands in one term only; sum or expand it explicitly"
            )
    return a, b, out


def _sizes(equation: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, int]:
    left, right, _ = parse(equation)
    sizes: dict[str, int] = {}
    for letters, tensor in ((left, a), (right, b)):
        if len(letters) != tensor.dim():
            raise ValueError(f"einsum {equation!r}: {letters!r} against a tensor of shape {tuple(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"einsum {equation!r}: {letter!r} is {sizes[letter]} in one operand, {size} in other")
    return sizes


def matrices(
    equation: str, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """The product as (batch, rows, inner) x (batch, inner, columns), then the shape and order to bring it back.

    Without batch letters the operands are 2-dimensional. For the equations of the model they are views.
    """
    layouts, shape, order = _plan(equation, a, b)
    lhs, rhs = (_matrix(x, *layout) for x, layout in zip((a, b), layouts, strict=True))
    return lhs, rhs, shape, order


def _plan(equation: str, a: torch.Tensor, b: torch.Tensor) -> tuple[list[tuple[Any, ...]], list[int], list[int]]:
    """Letters, sizes, batch, rows and columns of both matrices; shape of their product by letters, order to bring it
    back."""
    left, right, out = parse(equation)
    sizes = _sizes(equation, a, b)
    batch = [x for x in out if x in left and x in right]
    inner = [x for x in left if x in right and x not in out]
    rows = [x for x in out if x in left and x not in right]
    columns = [x for x in out if x in right and x not in left]
    made = batch + rows + columns
    layouts = [(left, sizes, batch, rows, inner), (right, sizes, batch, inner, columns)]
    return layouts, [sizes[x] for x in made], [made.index(x) for x in out]


def einsum_reference(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One (batched) matrix product, contiguous."""
    lhs, rhs, shape, order = matrices(equation, a, b)
    product = torch.bmm(lhs, rhs) if lhs.dim() == 3 else torch.mm(lhs, rhs)
    return product.reshape(shape).permute(order).contiguous()


def stored_layouts(
    equation: str, a: torch.Tensor, b: torch.Tensor
) -> tuple[tuple[int, int, bool], tuple[int, int, bool], bool]:
    """Rows, columns and "lies transposed" of both operands as matrices; and whether the product of the two, as they lie
    in memory, is the result."""
    layouts, _, order = _plan(equation, a, b)
    parts, straight = [], order == sorted(order)
    for letters, sizes, batch, rows, columns in layouts:
        swapped = _swapped(letters, batch, rows, columns)
        straight = straight and not batch and list(letters) == (columns + rows if swapped else rows + columns)
        parts.append((prod(sizes[x] for x in rows), prod(sizes[x] for x in columns), swapped))
    return parts[0], parts[1], straight


def einsum_npu(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One MatMul that reads transposed operands as they lie in memory."""
    layouts, shape, order = _plan(equation, a, b)
    (lhs, turn_lhs), (rhs, turn_rhs) = (_stored(x, *layout) for x, layout in zip((a, b), layouts, strict=True))
    product = matmul.op(lhs, rhs, turn_lhs, turn_rhs).reshape(shape)
    return product if order == sorted(order) else product.permute(order).contiguous()


def _swapped(letters: str, batch: list[str], rows: list[str], columns: list[str]) -> bool:
    """Whether the transpose of the matrix lies in memory."""
    return list(letters) == batch + columns + rows and list(letters) != batch + rows + columns


def _stored(
    x: torch.Tensor, letters: str, sizes: dict[str, int], batch: list[str], rows: list[str], columns: list[str]
) -> tuple[torch.Tensor, bool]:
    """The matrix as it lies in memory, and whether that is its transpose."""
    swapped = _swapped(letters, batch, rows, columns)
    groups = ([batch] if batch else []) + ([columns, rows] if swapped else [rows, columns])
    order = [letters.index(letter) for group in groups for letter in group]
    x = x if order == list(range(x.dim())) else x.permute(order)
    return x.reshape([prod(sizes[letter] for letter in group) for group in groups]), swapped


def _matrix(x: torch.Tensor, *layout: Any) -> torch.Tensor:
    stored, swapped = _stored(x, *layout)
    return stored.transpose(-1, -2) if swapped else stored


def _abstract(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    sizes = _sizes(equation, a, b)
    return a.new_empty([sizes[letter] for letter in parse(equation)[2]])


def _vjp(
    inputs: Sequence[Argument], outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
) -> tuple[None, torch.Tensor, torch.Tensor]:
    equation, a, b = inputs
    left, right, out = parse(equation)
    (dy,) = cotangents
    return None, einsum(f"{out},{right}->{left}", dy, b), einsum(f"{left},{out}->{right}", a, dy)


def _factors(equation: str, a: torch.Tensor, b: torch.Tensor) -> Factors:
    left, right, out = (" ".join(term) for term in parse(equation))
    return Factors(f"{left}, {right} -> {out}")


def _flops(equation: str, a: torch.Tensor, b: torch.Tensor) -> int:
    return 2 * prod(_sizes(equation, a, b).values())


def matmul_reference(a: torch.Tensor, b: torch.Tensor, turn_a: bool, turn_b: bool) -> torch.Tensor:
    """a b, [M, N] or [B, M, N], each operand being given transposed where it is turned."""
    return torch.matmul(a.transpose(-1, -2) if turn_a else a, b.transpose(-1, -2) if turn_b else b)


matmul = kernel(
    name="matmul",
    schema="(Tensor a, Tensor b, bool turn_a, bool turn_b) -> Tensor",
    reference=matmul_reference,
    abstract=lambda *args: matmul_reference(*args).contiguous(),
    factors=lambda *_: Factors(" -> "),
    opaque=True,
)

einsum = kernel(
    name="einsum",
    schema="(str equation, Tensor a, Tensor b) -> Tensor",
    reference=einsum_reference,
    abstract=_abstract,
    factors=_factors,
    flops=_flops,
    vjp=_vjp,
    npu=einsum_npu,
)
