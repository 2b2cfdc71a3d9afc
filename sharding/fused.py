"""A collective and the matrix product beside it as one op, for devices that overlap the two inside a kernel.

    all_gather_matmul(x, w, n)        gathered = the devices' x [m, k] one after the other, [n m, k]; and gathered w
    matmul_reduce_scatter(a, b, n)    a b [m, p] summed over the devices, and of it the device's own n-th of the rows

`transposed`: the second operand is given transposed. CANN calls them AllGatherMatmul and MatmulReduceScatter.
"""

from __future__ import annotations

from typing import Any

import torch

from sharding.collectives import collective, sent_bytes

_SCHEMA = "(Tensor a, Tensor b, str axes, int n, bool transposed) -> "
UNFUSED = {"all_gather_matmul": "all_gather", "matmul_reduce_scatter": "reduce_scatter"}


def _columns(b: torch.Tensor, transposed: bool) -> int:
    return b.shape[0] if transposed else b.shape[1]


all_gather_matmul = collective(
    "all_gather_matmul",
    _SCHEMA + "(Tensor, Tensor)",
    lambda a, b, axes, n, transposed: (
        a.new_empty((a.shape[0] * n, _columns(b, transposed))), a.new_empty((a.shape[0] * n, a.shape[1])),
    ),
    lambda a, b, axes, n, transposed: 2 * a.shape[0] * n * b.numel(),
)  # fmt: skip
matmul_reduce_scatter = collective(
    "matmul_reduce_scatter",
    _SCHEMA + "Tensor",
    lambda a, b, axes, n, transposed: a.new_empty((a.shape[0] // n, _columns(b, transposed))),
    lambda a, b, axes, n, transposed: 2 * a.shape[0] * b.numel(),
)


def sent(name: str, args: Any) -> int:
    """Bytes that one device sends, as in the collective that is inside."""
    a, b, _, n, transposed = args
    moved = a if name == "all_gather_matmul" else a.new_empty((a.shape[0], _columns(b, transposed)))
    return sent_bytes(UNFUSED[name], moved, n)
