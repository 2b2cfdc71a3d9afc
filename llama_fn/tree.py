"""The one pytree dialect of the project: optree in its own namespace, None an empty node, dict keys sorted.

Nothing else in the project flattens. Classes made by :func:`dataclass` are opaque to torch's own pytrees, where
make_fx would bake their tensors in as constants: trees are flattened at every boundary to torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, dataclass_transform

import optree
import optree.dataclasses

NAMESPACE = "llama_fn"
TreeSpec = optree.PyTreeSpec
Tree = Any  # dataclasses, dicts, lists and tuples of leaves, or a leaf alone; which, no type can say
Leaf = Any  # what a tree holds at its ends: a tensor, or what declares one (model/arrays.py)


@dataclass_transform(frozen_default=True)
def dataclass(cls: type) -> Any:
    """A frozen dataclass whose fields are children. It must not validate in __post_init__: maps re-run it."""
    make: Any = optree.dataclasses.dataclass
    made = make(cls, frozen=True, namespace=NAMESPACE, repr=False)
    made.__repr__ = _overview
    return made


def _overview(node: Tree) -> str:
    """A line for each field: the shape of a leaf, or what a tree below holds."""
    lines = [f"{field.name}: {_short(getattr(node, field.name))}" for field in dataclasses.fields(node)]
    return "\n  ".join([f"{type(node).__name__} of {_totals(node)}", *lines])


def _short(value: Tree) -> str:
    if value is None:
        return "None"
    if hasattr(value, "shape"):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (int, float, str)):
        return repr(value)
    return f"{type(value).__name__} of {_totals(value)}"


def _totals(node: Tree) -> str:
    held = [leaf for leaf in leaves(node) if hasattr(leaf, "shape")]
    return f"{len(held)} arrays, {sum(prod(leaf.shape) for leaf in held):,} numbers"


def flatten(tree: Tree) -> tuple[list[Leaf], TreeSpec]:
    """Leaves in order, and what puts them together again."""
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(spec: TreeSpec, leaves: Iterable[Leaf]) -> Tree:
    """The tree that `flatten` took apart, with these leaves."""
    return optree.tree_unflatten(spec, leaves)


def leaves(tree: Tree) -> list[Leaf]:
    """Leaves in order; None is no leaf."""
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def map(fn: Callable[..., Leaf], tree: Tree, *rest: Tree) -> Tree:
    """The tree of fn(leaf, *leaves of `rest` at the same place)."""
    return optree.tree_map(fn, tree, *rest, namespace=NAMESPACE)


def paths(tree: Tree, root: str = "") -> list[str]:
    """One readable path per leaf, such as state.params.layers.wq or batch.tokens[0]."""
    accessors = optree.tree_accessors(tree, namespace=NAMESPACE)
    return [(root + _codify(accessor)).lstrip(".") for accessor in accessors]


def _codify(accessor: optree.PyTreeAccessor) -> str:
    text = ""
    for entry in accessor:
        key = entry.entry
        named = isinstance(entry, optree.DataclassEntry) or isinstance(key, str)
        text += f".{getattr(entry, 'field', key)}" if named else f"[{key}]"
    return text


def map_with_path(fn: Callable[..., Leaf], tree: Tree, *rest: Tree) -> Tree:
    """map, with the leaf's path as first argument."""
    flat, spec = flatten(tree)
    others = [leaves(other) for other in rest]
    return unflatten(spec, [fn(*args) for args in zip(paths(tree), flat, *others, strict=True)])


def by_path(tree: Tree) -> dict[str, Leaf]:
    """{"params.layers[0].wq": leaf, ...}."""
    return dict(zip(paths(tree), leaves(tree), strict=True))
