"""What a caller gives a traced function: arguments bound to its parameters, every leaf an array, no buffer given twice.

Numbers and NumPy arrays are arrays too. A Python float is a double and an int an int64, of no dimension, as they are
when the function is called as it is: arithmetic with tensors then has the tensors' dtype.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llama_fn import tree
from llama_fn.model.arrays import ArrayInfo
from llama_fn.tree import Leaf, Tree

NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


def name_of(fn: Callable[..., Any]) -> str:
    """What to call a function, a functools.partial of one, or a callable object."""
    wrapped = getattr(fn, "func", fn)
    return str(getattr(wrapped, "__name__", None) or type(wrapped).__name__)


@dataclass(frozen=True)
class Bound:
    """Arguments in the order of their parameters. `names` are "x", and "xs[1]" for the second of *xs; those from
    `positional` on go by keyword."""

    names: tuple[str, ...]
    values: tuple[Tree, ...]
    positional: int

    def call(self, fn: Callable[..., Any], values: Sequence[Tree]) -> Tree:
        """fn of other values for the same parameters."""
        n = self.positional
        return fn(*values[:n], **dict(zip(self.names[n:], values[n:], strict=True)))


def bind(fn: Callable[..., Any], args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> Bound:
    """fn's arguments; TypeError, as Python's own, where they are not what it takes."""
    try:
        signature = inspect.signature(fn)
    except ValueError:  # built-in functions need not have one
        names = tuple(f"arg{i}" for i in range(len(args)))
        return Bound((*names, *kwargs), (*args, *kwargs.values()), len(args))
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name_of(fn)}{signature}: {error}") from None
    names = tuple(_positional_names(signature, len(bound.args)))
    return Bound((*names, *bound.kwargs), (*bound.args, *bound.kwargs.values()), len(names))


def _positional_names(signature: inspect.Signature, count: int) -> Iterable[str]:
    for parameter in list(signature.parameters.values())[:count]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            break
        yield parameter.name
        count -= 1
    else:
        return
    yield from (f"{parameter.name}[{i}]" for i in range(count))


def as_array(x: Leaf, path: str) -> torch.Tensor | ArrayInfo:
    """A leaf as a tensor, or as the declaration of one; ValueError naming the path of what is neither."""
    if isinstance(x, (torch.Tensor, ArrayInfo)):
        if isinstance(x, torch.Tensor) and x.layout != torch.strided:
            raise ValueError(f"{path} is a tensor of layout {x.layout}; pass .to_dense()")
        return x
    if type(x) in NUMBERS:
        return torch.tensor(x, dtype=NUMBERS[type(x)])
    if isinstance(x, (np.ndarray, np.generic)):
        try:
            return torch.from_numpy(np.require(x, requirements=["C", "W"]))
        except TypeError:
            raise ValueError(f"{path} is a NumPy array of {x.dtype}, which torch has no dtype for") from None
    raise ValueError(
        f"{path} is a {type(x).__name__}. A traced function takes tensors, NumPy arrays and numbers, and trees of "
        "them; bind anything else beforehand, with functools.partial or a lambda"
    )


@dataclass(frozen=True)
class Leaves:
    """Flat arguments: the path of every leaf, what was given, the same as an array, and the tree they came from."""

    paths: Sequence[str]
    given: list[Leaf]
    arrays: list[Leaf]
    spec: tree.TreeSpec

    @classmethod
    def of(
        cls, names: Sequence[str], values: Sequence[Tree], known: tuple[tree.TreeSpec, Sequence[str]] | None = None
    ) -> Leaves:
        """ValueError naming the path of a leaf that is no array. `known`: a tree and its paths, which need not be found
        again where the values are such a tree: that takes longer than the rest of a call."""
        given, spec = tree.flatten(tuple(values))
        if known is not None and spec == known[0]:
            paths: Sequence[str] = known[1]
        else:
            paths = [path for name, value in zip(names, values, strict=True) for path in tree.paths(value, name)]
        return cls(paths, given, [as_array(x, path) for x, path in zip(given, paths, strict=True)], spec)


# By the address of its storage, every tensor whose step was interrupted, for as long as the caller holds it.
_SPOILED: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()


def spoil(tensors: Iterable[torch.Tensor]) -> None:
    """Remember that a step ended while it may have been writing into these: some may be new and others old."""
    _SPOILED.update({x.untyped_storage().data_ptr(): x for x in tensors})


def refuse_spoiled(paths: Sequence[str], leaves: Sequence[torch.Tensor]) -> None:
    """ValueError for a leaf that an interrupted step may have overwritten."""
    if not _SPOILED:
        return
    spoiled = [path for path, x in zip(paths, leaves, strict=True) if x.untyped_storage().data_ptr() in _SPOILED]
    if spoiled:
        raise ValueError(
            f"{spoiled[0]}{f' and {len(spoiled) - 1} more' if spoiled[1:] else ''} was donated to a step that did not "
            "end: some leaves may hold new values and others old ones. Begin again from a checkpoint or a new state"
        )


def refuse_shared(paths: Sequence[str], leaves: Sequence[torch.Tensor], donated: Sequence[int]) -> None:
    """ValueError where the memory of a donated leaf, which the step overwrites, is also that of another leaf. All are
    contiguous."""
    overwritten = set(donated)
    before: tuple[int, int] = (-2, 0)  # device, and how far the spans so far reach on it
    reaching = -1  # the leaf that does
    for device, start, stop, i in sorted((*_span(x), i) for i, x in enumerate(leaves) if x.numel()):
        if device == before[0] and start < before[1] and (i in overwritten or reaching in overwritten):
            a, b = sorted((reaching, i))
            raise ValueError(
                f"{paths[a]} and {paths[b]} share memory, and a donated argument is overwritten while the others are "
                "still read. Give each a tensor of its own (.clone())"
            )
        if device != before[0] or stop > before[1]:
            before, reaching = (device, stop), i


def _span(x: torch.Tensor) -> tuple[int, int, int]:
    """Number of the device, -1 for the host, and first and last byte of a contiguous tensor."""
    start = x.data_ptr()
    return x.get_device(), start, start + x.nbytes
