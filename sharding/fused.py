"""A collective and the matrix product beside it as one op, for devices that overlap the two inside a kernel.

    all_gather_matmul(x, w, n)        gathered = the devices' x [m, k] one after the other, [n m, k]; and gathered w
    matmul_reduce_scatter(a, b, n)    a b [m, p] summed over the devices, and of it the device's own n-th of the rows

`turn`: the second operand is given transposed. CANN calls them AllGatherMatmul and MatmulReduceScatter.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.registry import Factors, Kernel, kernel
from sharding.collectives import _no_backend, sent_bytes

_SCHEMA = "(Tensor a, Tensor b, str axes, int n, bool turn) -> "
UNFUSED = {"all_gather_matmul": "all_gather", "matmul_reduce_scatter": "reduce_scatter"}


def _columns(b: torch.Tensor, turn: bool) -> int:
    return b.shape[0] if turn else b.shape[1]


def _flops(a: torch.Tensor, b: torch.Tensor, rows: int) -> int:
    return 2 * rows * a.shape[1] * b.numel() // a.shape[1]


def _fused(name: str, results: str, abstract: Any, flops: Any) -> Kernel:
    return kernel(
        name=name, schema=_SCHEMA + results, reference=_no_backend, abstract=abstract, flops=flops, opaque=True,
        factors=lambda *_: Factors(" -> "),
    )  # fmt: skip


all_gather_matmul = _fused(
    "all_gather_matmul",
    "(Tensor, Tensor)",
    lambda a, b, axes, n, turn: (
        a.new_empty((a.shape[0] * n, _columns(b, turn))), a.new_empty((a.shape[0] * n, a.shape[1])),
    ),
    lambda a, b, axes, n, turn: _flops(a, b, a.shape[0] * n),
)  # fmt: skip
matmul_reduce_scatter = _fused(
    "matmul_reduce_scatter",
    "Tensor",
    lambda a, b, axes, n, turn: a.new_empty((a.shape[0] // n, _columns(b, turn))),
    lambda a, b, axes, n, turn: _flops(a, b, a.shape[0]),
)


def sent(name: str, args: Any) -> int:
    """Bytes that one device sends, as in the collective that is inside."""
    a, b, _, n, turn = args
    moved = a if name == "all_gather_matmul" else a.new_empty((a.shape[0], _columns(b, turn)))
    return sent_bytes(UNFUSED[name], moved, n)
