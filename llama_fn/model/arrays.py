"""ArrayInfo: the one declaration of an array, from which init, shardings, checkpoints and memory are tree maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from kernels.scope import caller
from llama_fn import progress, tree
from llama_fn.model import random
from llama_fn.tree import Leaf, Tree
from sharding.parts import Part, Region, whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "bool", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Init:
    """How an array starts: normal with `std`, or the constant `value` where std is 0."""

    std: float = 0.0
    value: float = 0.0


@dataclass(frozen=True)
class ArrayInfo:
    """Shape, dtype, logical axes (one name or None per dimension) and init of an array that need not exist.

    `table` is the table of the sharding rules that lays it out between steps: params, moments or compute. `source` is
    the line of the declaration, by default the one that makes this record; collectives of the array carry it. `stays`:
    the caller keeps it in the same memory from call to call, as parameters and moments are.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[str | None, ...] = ()
    init: Init = Init()
    table: str = "params"
    stays: bool = False
    source: str = field(default_factory=caller, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Elements, of the global shape."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, of the global shape."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return describe(self)


def describe(x: Leaf) -> str:
    """f32[2,3] for anything with a shape and a dtype."""
    if not hasattr(x, "shape"):
        return repr(x)
    return f"{SHORT.get(x.dtype, str(x.dtype))}[{','.join(str(s) for s in x.shape)}]"


def abstract(x: Leaf) -> ArrayInfo:
    """The ArrayInfo of a tensor or of anything that already has a shape and a dtype."""
    return x if isinstance(x, ArrayInfo) else ArrayInfo(tuple(x.shape), x.dtype)


def total_size(infos: Tree) -> int:
    """Number of elements in a tree of ArrayInfo."""
    return sum(info.size for info in tree.leaves(infos))


def total_bytes(infos: Tree) -> int:
    """Bytes of a tree of ArrayInfo."""
    return sum(info.bytes for info in tree.leaves(infos))


def materialize(infos: Tree, key: random.Key, device: str = "cpu", parts: Sequence[Part] | None = None) -> Tree:
    """Tensors for a tree of ArrayInfo; every leaf draws from `key` folded with its own path, so the values depend
    neither on the order of the leaves nor on which device or shard asks for them.

    `parts`, one per leaf: only that part of each, which is never whole in memory.
    """
    each = progress.tracked(parts or [whole(info.shape) for info in tree.leaves(infos)])

    def make(path: str, info: ArrayInfo) -> torch.Tensor:
        def values(at: Region) -> torch.Tensor:
            if info.init.std:
                return random.normal(random.fold_in(key, path), info.shape, info.init.std, info.dtype, at)
            return torch.full([s.stop - s.start for s in at], info.init.value, dtype=info.dtype)

        return next(each).filled(values).to(device)

    return tree.map_with_path(make, infos)
