"""The collectives of a per-device graph, as ops. Axes are named in the op ("data+model"); groups come from the mesh.

Their results per device, for n devices along the axes:

    all_gather(x, dim)       n times as long along dim
    reduce_scatter(x, dim)   the sum, and of it the device's own n-th along dim
    all_reduce(x, kind)      the sum or the maximum
    all_to_all(x, split, concat)   a n-th of dim `split`, n times dim `concat`
    own_slice(x, dim)        the device's own n-th along dim: no communication
    axis_index()             the device's position along the axes, int64 scalar: no communication

They are opaque: a backend says how they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.registry import Factors, Kernel, kernel, tensor_bytes


def axes_text(axes: tuple[str, ...]) -> str:
    return "+".join(axes)


def axes_of(text: str) -> tuple[str, ...]:
    return tuple(text.split("+"))


def _resized(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _own_part(x: torch.Tensor, axes: str, n: int, dim: int) -> torch.Tensor:
    return _resized(x, dim, x.shape[dim] // n)


def _no_backend(*args: Any) -> Any:
    raise RuntimeError("a collective was called outside of a backend that knows the mesh")


def _collective(name: str, schema: str, abstract: Callable[..., Any]) -> Kernel:
    return kernel(
        name=name, schema=schema, reference=_no_backend, abstract=abstract, opaque=True,
        factors=lambda *_: Factors(" -> "),
    )  # fmt: skip


all_gather = _collective(
    "all_gather",
    "(Tensor x, str axes, int n, int dim) -> Tensor",
    lambda x, axes, n, dim: _resized(x, dim, x.shape[dim] * n),
)
reduce_scatter = _collective(
    "reduce_scatter",
    "(Tensor x, str axes, int n, int dim) -> Tensor",
    _own_part,
)
all_reduce = _collective(
    "all_reduce",
    "(Tensor x, str axes, int n, str kind) -> Tensor",
    lambda x, axes, n, kind: torch.empty_like(x, memory_format=torch.contiguous_format),
)
all_to_all = _collective(
    "all_to_all",
    "(Tensor x, str axes, int n, int split, int concat) -> Tensor",
    lambda x, axes, n, split, concat: _resized(_resized(x, split, x.shape[split] // n), concat, x.shape[concat] * n),
)
own_slice = _collective(
    "own_slice",
    "(Tensor x, str axes, int n, int dim) -> Tensor",
    _own_part,
)
axis_index = _collective(
    "axis_index",
    "(Tensor like, str axes) -> Tensor",
    lambda like, axes: like.new_empty((), dtype=torch.int64),
)

COMMUNICATING = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
LOCAL = ("own_slice", "axis_index")


def sent_bytes(name: str, x: Any, n: int) -> int:
    """Bytes that one device sends in a ring (all_to_all: direct exchange) for operand `x`."""
    size = tensor_bytes(x)
    return {
        "all_gather": size * (n - 1),
        "reduce_scatter": size * (n - 1) // n,
        "all_reduce": 2 * size * (n - 1) // n,
        "all_to_all": size * (n - 1) // n,
    }[name]
