"""The one pytree dialect of the project: optree in its own namespace, None an empty node, dict keys sorted.

Nothing else in the project flattens. Classes made by :func:`dataclass` are opaque to torch's own pytrees, where
make_fx would bake their tensors in as constants: trees are flattened at every boundary to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, dataclass_transform

import optree
import optree.dataclasses

NAMESPACE = "llama_fn"
TreeSpec = optree.PyTreeSpec


@dataclass_transform(frozen_default=True)
def dataclass(cls: type) -> Any:
    """A frozen dataclass whose fields are children. It must not validate in __post_init__: maps re-run it."""
    make: Any = optree.dataclasses.dataclass
    return make(cls, frozen=True, namespace=NAMESPACE)


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(spec: TreeSpec, leaves: Any) -> Any:
    return optree.tree_unflatten(spec, leaves)


def leaves(tree: Any) -> list[Any]:
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    return optree.tree_map(fn, tree, *rest, namespace=NAMESPACE)


def paths(tree: Any, root: str = "") -> list[str]:
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


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """map, with the leaf's path as first argument."""
    flat, spec = flatten(tree)
    others = [leaves(other) for other in rest]
    return unflatten(spec, [fn(*args) for args in zip(paths(tree), flat, *others, strict=True)])


def by_path(tree: Any) -> dict[str, Any]:
    return dict(zip(paths(tree), leaves(tree), strict=True))
