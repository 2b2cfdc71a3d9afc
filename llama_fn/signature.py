"""What goes into a traced function and what comes out of it, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llama_fn import compat, tree
from llama_fn.arrays import ArrayInfo, describe


@dataclass(frozen=True)
class Signature:
    """Trees that go in and come out, leaf by leaf; `donated` are the arguments whose buffers the caller gives up."""

    in_spec: Any
    in_paths: tuple[str, ...]
    in_infos: tuple[ArrayInfo, ...]
    out_spec: Any
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
            if path == name or path.startswith((name + ".", name + "["))
        ]

    @cached_property
    def aliases(self) -> list[tuple[int, int]]:
        """(input leaf, output leaf) pairs that share one buffer."""
        by_path = {path: i for i, path in enumerate(self.out_paths)}
        return [(i, by_path[path]) for i, path in self.donations]

    def check(self, args: Sequence[Any], what: str) -> list[Any]:
        """The flat leaves of args; ValueError naming every path whose leaf is missing, extra, or of another type."""
        leaves, spec = tree.flatten(tuple(args))
        if spec == self.in_spec and all(_matches(x, i) for x, i in zip(leaves, self.in_infos, strict=True)):
            return leaves
        given = dict(zip(argument_paths(args, self.argument_names), leaves, strict=True))
        expected = dict(zip(self.in_paths, self.in_infos, strict=True))
        lines = [
            f"  {path}: expected {describe(expected[path]) if path in expected else 'nothing'}, "
            f"given {describe(given[path]) if path in given else 'nothing'}"
            for path in [*expected, *(p for p in given if p not in expected)]
            if path not in expected or path not in given or not _matches(given[path], expected[path])
        ] or [f"  trees differ in structure: expected {self.in_spec}, given {spec}"]
        raise ValueError("\n".join([f"{what} was made for other arguments:", *lines[:20], *_more(len(lines) - 20)]))

    def check_donation(self, results: Sequence[Any]) -> None:
        """ValueError unless every donated leaf has a result of its shape and dtype that takes its buffer."""
        by_path = dict(zip(self.out_paths, results, strict=True))
        for i, out_path in self.donations:
            result, info = by_path.get(out_path), self.in_infos[i]
            if result is None or not _matches(compat.node_value(result), info):
                found = "nothing" if result is None else describe(compat.node_value(result))
                raise ValueError(
                    f"donated argument {self.in_paths[i]}: the result that takes its buffer, {out_path}, must be "
                    f"{describe(info)} and is {found}"
                )


def _more(n: int) -> list[str]:
    return [f"  ... and {n} more"] if n > 0 else []


def _matches(x: Any, info: ArrayInfo) -> bool:
    return hasattr(x, "shape") and tuple(x.shape) == info.shape and x.dtype == info.dtype


def argument_paths(args: Sequence[Any], names: Sequence[str]) -> list[str]:
    return [path for arg, name in zip(args, names, strict=True) for path in tree.paths(arg, name)]
