"""What goes into a traced function and what comes out of it, leaf by leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llama_fn import compat
from llama_fn.compiler.arguments import Leaves, refuse_shared, refuse_spoiled
from llama_fn.model.arrays import ArrayInfo, describe
from llama_fn.tree import Leaf, Tree, TreeSpec


def is_within(path: str, argument: str) -> bool:
    """Whether a leaf's path lies in an argument: state.params.wq in "state", xs[1].a in "xs[1]"."""
    return path == argument or path.startswith((argument + ".", argument + "["))


@dataclass(frozen=True)
class Signature:
    """Trees that go in and come out, leaf by leaf; `donated` are the arguments whose buffers the caller gives up."""

    in_spec: TreeSpec
    in_paths: tuple[str, ...]
    in_infos: tuple[ArrayInfo, ...]
    out_spec: TreeSpec
    out_paths: tuple[str, ...]
    donated: tuple[int, ...]
    argument_names: tuple[str, ...]

    @cached_property
    def donations(self) -> list[tuple[int, str]]:
        """(input leaf, path of the result that takes its buffer): the k-th donated argument is the k-th result."""
        return [
            (i, f"out[{position}]{path[len(name) :]}")
            for position, name in enumerate(self.argument_names[argument] for argument in self.donated)
            for i, path in enumerate(self.in_paths)
            if is_within(path, name)
        ]

    @cached_property
    def aliases(self) -> list[tuple[int, int]]:
        """(input leaf, output leaf) pairs that share one buffer."""
        by_path = {path: i for i, path in enumerate(self.out_paths)}
        return [(i, by_path[path]) for i, path in self.donations]

    @cached_property
    def overwritten(self) -> list[int]:
        """The input leaves that are donated."""
        return [i for i, _ in self.donations]

    def leaves(self, args: Sequence[Tree], kwargs: Mapping[str, Tree], what: str) -> Leaves:
        """A call's arguments; ValueError naming every path whose leaf is missing, extra, or of another type."""
        leaves = Leaves.of(*self._ordered(args, kwargs, what), known=(self.in_spec, self.in_paths))
        if leaves.spec == self.in_spec and all(
            _matches(x, i) for x, i in zip(leaves.arrays, self.in_infos, strict=True)
        ):
            return leaves
        given = dict(zip(leaves.paths, leaves.arrays, strict=True))
        expected = dict(zip(self.in_paths, self.in_infos, strict=True))
        lines = [
            f"  {path}: expected {describe(expected[path]) if path in expected else 'nothing'}, "
            f"given {describe(given[path]) if path in given else 'nothing'}"
            for path in [*expected, *(p for p in given if p not in expected)]
            if path not in expected or path not in given or not _matches(given[path], expected[path])
        ] or [f"  trees differ in structure: expected {self.in_spec}, given {leaves.spec}"]
        raise ValueError("\n".join([f"{what} was made for other arguments:", *lines[:20], *_more(len(lines) - 20)]))

    def inputs(
        self, args: Sequence[Tree], kwargs: Mapping[str, Tree], what: str, device: str | None
    ) -> list[torch.Tensor]:
        """The tensors that an executable on `device` (None: any) takes, from a call's arguments.

        What is not donated is copied where it has to be: transposed or sliced tensors into one block, numbers and NumPy
        arrays onto the device. ValueError for a donated leaf that would have to be, that shares its memory with another
        leaf, or that an interrupted step has spoiled, and for a tensor on another device.
        """
        leaves, donated = self.leaves(args, kwargs, what), set(self.overwritten)
        tensors = [
            self._ready(x, path, i in donated, isinstance(was, torch.Tensor), device)
            for i, (path, was, x) in enumerate(zip(leaves.paths, leaves.given, leaves.arrays, strict=True))
        ]
        refuse_spoiled(leaves.paths, tensors)
        if donated:
            refuse_shared(leaves.paths, tensors, self.overwritten)
        return tensors

    @staticmethod
    def _ready(x: torch.Tensor, path: str, donated: bool, was_tensor: bool, device: str | None) -> torch.Tensor:
        if donated and not was_tensor:
            raise ValueError(f"{path} is donated, and so must be a tensor: its buffer takes the new value")
        if device is not None and x.device.type != torch.device(device).type:
            if was_tensor:
                raise ValueError(f"{path} is on {x.device}, and this was compiled for {device}: pass .to({device!r})")
            x = x.to(device)
        if not x.is_contiguous():
            if donated:
                raise ValueError(
                    f"{path} is donated and not contiguous (shape {tuple(x.shape)}, strides {x.stride()}); its buffer "
                    "cannot take the new value. Pass .contiguous()"
                )
            x = x.contiguous()
        return x

    def _ordered(
        self, args: Sequence[Tree], kwargs: Mapping[str, Tree], what: str
    ) -> tuple[Sequence[str], Sequence[Leaf]]:
        """Names and values of a call's arguments, in the order in which they were traced."""
        if not kwargs and len(args) == len(self.argument_names):
            return self.argument_names, args
        names = [*self.argument_names, *(f"argument {i}" for i in range(len(self.argument_names), len(args)))]
        by_name = dict(zip(names, args, strict=False))
        twice = sorted(set(by_name) & set(kwargs))
        if twice:
            raise TypeError(f"{what} got two values for {twice[0]}")
        by_name |= kwargs
        order = sorted(by_name, key=lambda name: names.index(name) if name in names else len(names))
        return order, [by_name[name] for name in order]

    def check_donation(self, results: Sequence[Any]) -> None:
        """ValueError unless every donated leaf has a result of its shape and dtype that takes its buffer."""
        by_path = dict(zip(self.out_paths, results, strict=True))
        for i, out_path in self.donations:
            result, info = by_path.get(out_path), self.in_infos[i]
            if result is None or not _matches(compat.node_value(result), info):
                returned = "nothing" if result is None else describe(compat.node_value(result))
                raise ValueError(
                    f"donated argument {self.in_paths[i]}: the result that takes its buffer, {out_path}, must be "
                    f"{describe(info)} and is {returned}"
                )


def _more(n: int) -> list[str]:
    return [f"  ... and {n} more"] if n > 0 else []


def _matches(x: Leaf, info: ArrayInfo) -> bool:
    return hasattr(x, "shape") and tuple(x.shape) == info.shape and x.dtype == info.dtype
