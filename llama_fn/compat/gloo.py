"""Functional collectives over gloo, on CPU, by torch.distributed's own asynchronous calls.

Torch's C++ functional collectives (2.13) corrupt memory over gloo now and then, why is not known: two processes that do
little else crash or hang within thousands of calls, with "malloc(): unaligned tcache chunk detected" or without a word.
In the same trials torch.distributed's calls, whose work the caller holds, did not. tests/multirank has the trial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

_LIBRARY: list[torch.library.Library] = []  # registered for as long as the process lives
_PENDING: dict[int, tuple[torch.Tensor, Any]] = {}  # results under way and their work, by address


def register_gloo_collectives() -> None:
    """Let CPU tensors take the calls here in all functional collectives that graphs hold. Once is enough."""
    if not _LIBRARY:
        _LIBRARY.append(torch.library.Library("_c10d_functional", "IMPL"))
        calls: Sequence[Callable[..., Any]] = (
            all_gather_into_tensor, reduce_scatter_tensor, all_reduce, all_reduce_, all_to_all_single, wait_tensor,
        )  # fmt: skip
        for call in calls:
            _LIBRARY[0].impl(call.__name__, call, "CPU")


def _started(result: torch.Tensor, work: Any) -> torch.Tensor:
    _PENDING[result.untyped_storage().data_ptr()] = result, work
    return result


def all_gather_into_tensor(x: torch.Tensor, n: int, group: str) -> torch.Tensor:
    """x of all n members along dim 0, once wait_tensor has seen it."""
    result = x.new_empty((n * x.shape[0], *x.shape[1:]))
    return _started(result, dist.all_gather_single(result, x, group_of(group), async_op=True))


def reduce_scatter_tensor(x: torch.Tensor, kind: str, n: int, group: str) -> torch.Tensor:
    """This member's n-th of the sum of x over the group, along dim 0, once wait_tensor has seen it."""
    result = x.new_empty((x.shape[0] // n, *x.shape[1:]))
    return _started(result, dist.reduce_scatter_single(result, x, _reduction(kind), group_of(group), async_op=True))


def all_reduce(x: torch.Tensor, kind: str, group: str) -> torch.Tensor:
    """The sum (or maximum, by `kind`) of x over the group, once wait_tensor has seen it; x stays."""
    return all_reduce_(x.clone(), kind, group)


def all_reduce_(x: torch.Tensor, kind: str, group: str) -> torch.Tensor:
    """The same in x's own memory."""
    return _started(x, dist.all_reduce(x, _reduction(kind), group_of(group), async_op=True))


def all_to_all_single(x: torch.Tensor, received: list[int], sent: list[int], group: str) -> torch.Tensor:
    """Rows from each member, as many as `received` says; `sent` rows of x go to each."""
    result = x.new_empty((sum(received), *x.shape[1:]))
    return _started(result, dist.all_to_all_single(result, x, received, sent, group_of(group), async_op=True))


def wait_tensor(x: torch.Tensor) -> torch.Tensor:
    """x, once the collective that makes it has ended."""
    _, work = _PENDING.pop(x.untyped_storage().data_ptr())
    work.wait()
    return x


def group_of(name: str) -> dist.ProcessGroup:
    """The process group that torch registered under this name."""
    return _resolve_process_group(GroupName(name))


def _reduction(kind: str) -> Any:
    return getattr(dist.ReduceOp, kind.upper())
