"""The collectives of a per-device graph as torch's functional collectives, which compilers know."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sharding.collectives import put_together, unstacked

c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Group:
    """This process's group along some mesh axes: its name in torch.distributed and this process's place in it."""

    name: str
    index: int


def _stacked(x: torch.Tensor, n: int, dim: int) -> torch.Tensor:
    """n-ths of `dim` one after the other in dimension 0, as the collectives send them."""
    return x.contiguous() if dim == 0 else x.unflatten(dim, (n, -1)).movedim(dim, 0).flatten(0, 1).contiguous()


def collective_forms(groups: Mapping[str, Group]) -> Mapping[str, Callable[..., Any]]:
    """By op name; `groups` by the axes text of the ops."""

    def all_gather_start(x: torch.Tensor, axes: str, n: int, dim: int) -> torch.Tensor:
        return c10d.all_gather_into_tensor(x.contiguous(), n, groups[axes].name)

    def reduce_scatter_start(x: torch.Tensor, axes: str, n: int, dim: int) -> torch.Tensor:
        return c10d.reduce_scatter_tensor(_stacked(x, n, dim), "sum", n, groups[axes].name)

    def all_reduce_start(x: torch.Tensor, axes: str, n: int, kind: str) -> torch.Tensor:
        return c10d.all_reduce(x.contiguous(), kind, groups[axes].name)

    def all_to_all_start(x: torch.Tensor, axes: str, n: int, split: int, concat: int) -> torch.Tensor:
        sent = _stacked(x, n, split)
        sizes = [sent.shape[0] // n] * n
        return c10d.all_to_all_single(sent, sizes, sizes, groups[axes].name)

    def wait(pending: torch.Tensor, x: torch.Tensor, n: int, dim: int) -> torch.Tensor:
        return unstacked(c10d.wait_tensor(pending), n, dim)

    def own_slice(x: torch.Tensor, axes: str, n: int, dim: int) -> torch.Tensor:
        width = x.shape[dim] // n
        return x.narrow(dim, groups[axes].index * width, width).contiguous()

    def axis_index(like: torch.Tensor, axes: str) -> torch.Tensor:
        return torch.full((), groups[axes].index, dtype=torch.int64, device=like.device)

    starts: dict[str, Callable[..., Any]] = {
        "all_gather": all_gather_start, "reduce_scatter": reduce_scatter_start, "all_reduce": all_reduce_start,
        "all_to_all": all_to_all_start,
    }  # fmt: skip

    def at_once(name: str) -> Callable[..., torch.Tensor]:
        return lambda x, *args: wait(starts[name](x, *args), x, args[1], put_together(name, args))

    def all_gather_matmul(a: torch.Tensor, b: torch.Tensor, axes: str, n: int, transposed: bool) -> Any:
        whole = wait(all_gather_start(a, axes, n, 0), a, n, 0)
        return torch.mm(whole, b.t() if transposed else b), whole

    def matmul_reduce_scatter(a: torch.Tensor, b: torch.Tensor, axes: str, n: int, transposed: bool) -> torch.Tensor:
        product = torch.mm(a, b.t() if transposed else b)
        return wait(reduce_scatter_start(product, axes, n, 0), product, n, 0)

    return {
        "all_gather_matmul": all_gather_matmul, "matmul_reduce_scatter": matmul_reduce_scatter,
        **{f"{name}_start": fn for name, fn in starts.items()}, "wait": wait,
        **{name: at_once(name) for name in starts}, "own_slice": own_slice, "axis_index": axis_index,
    }  # fmt: skip


def is_collective(target: Any) -> bool:
    """Whether a node's target is one of torch's functional collectives."""
    return getattr(target, "namespace", "") == "_c10d_functional"


def group_name(group: Any) -> str:
    """The name under which functional collectives find a process group."""
    return str(group.group_name)


def collectives_entered(most: int) -> list[str]:
    """The last collectives of this process that torch's flight recorder knows, oldest first; none without it."""
    if not torch.distributed.is_available():
        return []
    import torch._C._distributed_c10d as recorder

    entries = json.loads(recorder._dump_fr_trace_json(True, False)).get("entries", [])  # type: ignore[attr-defined]
    return [_entry(each) for each in entries[-most:]]


def _entry(entry: Mapping[str, Any]) -> str:
    sizes = " ".join("x".join(map(str, size)) or "scalar" for size in entry["input_sizes"])
    dtypes = ", ".join(dict.fromkeys(entry["input_dtypes"]))
    group = entry["process_group"][-1]
    return (
        f"{entry['profiling_name']} {entry['collective_seq_id']} of {sizes} {dtypes}, group {group}: {entry['state']}"
    )
