"""The collectives of a per-device graph, as ops. Axes are named in the op ("data+model"); groups come from the mesh.

Their results per device, for n devices along the axes:

    all_gather(x, dim)       n times as long along dim
    reduce_scatter(x, dim)   the sum, and of it the device's own n-th along dim
    all_reduce(x, kind)      the sum or the maximum
    all_to_all(x, split, concat)   a n-th of dim `split`, n times dim `concat`
    own_slice(x, dim)        the device's own n-th along dim: no communication
    axis_index()             the device's position along the axes, int64 scalar: no communication

The first four can also be asked for in two steps, between which other work runs: NAME_start(x, ...) gives what arrives,
pieces of the devices one after the other in dimension 0, and wait(pending, x, n, dim) the result, with the n pieces put
together along dim. `x` stands in the wait because it has to live until then.

They are opaque: a backend says how they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.registry import Factors, Kernel, kernel, tensor_bytes


def axes_text(axes: tuple[str, ...]) -> str:
    """ "node+data": the form in which ops carry mesh axes."""
    return "+".join(axes)


def axes_of(text: str) -> tuple[str, ...]:
    """The inverse of axes_text."""
    return tuple(text.split("+"))


def _resized(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _own_part(x: torch.Tensor, axes: str, n: int, dim: int) -> torch.Tensor:
    return _resized(x, dim, x.shape[dim] // n)


def _no_backend(*args: Any) -> Any:
    raise RuntimeError("a collective was called outside of a backend that knows the mesh")


def collective(
    name: str, schema: str, abstract: Callable[..., Any], flops: Callable[..., int] = lambda *_: 0
) -> Kernel:
    """An op that backends run, each in its way."""
    return kernel(
        name=name, schema=schema, reference=_no_backend, abstract=abstract, opaque=True, flops=flops,
        factors=lambda *_: Factors(" -> "),
    )  # fmt: skip


def _part_of_split(x: torch.Tensor, axes: str, n: int, split: int, concat: int) -> torch.Tensor:
    return _resized(_resized(x, split, x.shape[split] // n), concat, x.shape[concat] * n)


def _like(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_GATHER = "(Tensor x, str axes, int n, int dim) -> Tensor"
_REDUCE = "(Tensor x, str axes, int n, str kind) -> Tensor"
_EXCHANGE = "(Tensor x, str axes, int n, int split, int concat) -> Tensor"

all_gather = collective("all_gather", _GATHER, lambda x, axes, n, dim: _resized(x, dim, x.shape[dim] * n))
reduce_scatter = collective("reduce_scatter", _GATHER, _own_part)
all_reduce = collective("all_reduce", _REDUCE, _like)
all_to_all = collective("all_to_all", _EXCHANGE, _part_of_split)
own_slice = collective("own_slice", _GATHER, _own_part)
axis_index = collective(
    "axis_index",
    "(Tensor like, str axes) -> Tensor",
    lambda like, axes: like.new_empty((), dtype=torch.int64),
)

all_gather_start = collective("all_gather_start", _GATHER, lambda x, axes, n, dim: _resized(x, 0, x.shape[0] * n))
reduce_scatter_start = collective("reduce_scatter_start", _GATHER, _own_part)
all_reduce_start = collective("all_reduce_start", _REDUCE, _like)
all_to_all_start = collective(
    "all_to_all_start", _EXCHANGE, lambda x, axes, n, split, concat: _part_of_split(x, axes, n, split, 0)
)
wait = collective(
    "wait",
    "(Tensor pending, Tensor x, int n, int dim) -> Tensor",
    lambda pending, x, n, dim: _like(pending) if dim == 0 else _part_of_split(pending, "", n, 0, dim),
)


STARTS = {
    "all_gather": all_gather_start, "reduce_scatter": reduce_scatter_start, "all_reduce": all_reduce_start,
    "all_to_all": all_to_all_start,
}  # fmt: skip


def put_together(name: str, args: Sequence[Any]) -> int:
    """The dimension that the wait for a collective called with (x, axes, n, ...) puts together."""
    return int(args[-1]) if name in ("all_gather", "all_to_all") else 0


def unstacked(x: torch.Tensor, n: int, dim: int) -> torch.Tensor:
    """n pieces one after the other in dimension 0, put together along `dim`."""
    return x if dim == 0 else x.unflatten(0, (n, -1)).movedim(0, dim).flatten(dim, dim + 1)


def communicates(kernel: Kernel | None) -> str:
    """The collective that a node of this kernel sends for, "" if it sends nothing."""
    name = kernel.name.removesuffix("_start") if kernel is not None else ""
    return name if name in STARTS else ""


def sent_bytes(name: str, x: Any, n: int) -> int:
    """Bytes that one device sends in a ring (all_to_all: direct exchange) for operand `x`."""
    size = tensor_bytes(x)
    return {
        "all_gather": size * (n - 1),
        "reduce_scatter": size * (n - 1) // n,
        "all_reduce": 2 * size * (n - 1) // n,
        "all_to_all": size * (n - 1) // n,
    }[name]
