"""Shardings of an op's results from those of its operands: kernels by their factor rule, aten ops by kind.

Nothing here moves data. What does not fit is a ShardingError with the annotation to write.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.registry import Kernel
from sharding.errors import ShardingError, where
from sharding.spec import P

aten = torch.ops.aten
ADDITIVE = (aten.add.Tensor, aten.sub.Tensor)
LIKE_COPY = (aten._to_copy.default, aten.clone.default, aten.neg.default)
SHAPE_ONLY = (aten.ones_like.default, aten.zeros_like.default, aten.full_like.default)


def by_factors(node: torch.fx.Node, kernel: Kernel, args: list[Any], layouts: list[P], parts: str = "") -> list[P]:
    """Layouts of a kernel's results. `args` are the global values, `layouts` those of its tensor operands; `parts` the
    factors that may be sharded though the rule says otherwise."""
    factors = kernel.factors(*args)
    axes_of: dict[str, tuple[str, ...]] = {}
    given: dict[str, P] = {}
    for letters, layout in zip(factors.operands, layouts, strict=False):
        if letters == ("_",):
            continue
        refuse_unreduced(node, layout)
        for dim, letter in enumerate(letters):
            axes = layout.axes(dim)
            if letter in axes_of and axes_of[letter] != axes:
                raise ShardingError(
                    f"{where(node)}: its rule {factors.rule!r} needs one sharding for {letter!r}, but the operands are "
                    f"{given[letter]} and {layout}. Write a constrain(...) that gives both the same"
                )
            axes_of[letter], given[letter] = axes, layout
    for letter in sorted(factors.replicated - set(parts)):
        if axes_of.get(letter):
            raise ShardingError(
                f"{where(node)}: {letter!r} of its rule {factors.rule!r} must be whole on every device, but it is "
                f"sharded over {'+'.join(axes_of[letter])} in {given[letter]}. Write a constrain(...) before it that "
                "leaves this dimension whole"
            )
    users = [axis for axes in axes_of.values() for axis in axes]
    twice = {axis for axis in users if users.count(axis) > 1}
    if twice:
        raise ShardingError(
            f"{where(node)}: mesh axis {sorted(twice)} shards two factors of {factors.rule!r} (operands {layouts}). "
            "Write a constrain(...) that frees one of them"
        )
    return [
        P.of(
            [axes_of.get(letter, ()) for letter in letters],
            [axis for letter, axes in axes_of.items() if letter not in letters for axis in axes],
        )
        for letters in factors.results
    ]


def refuse_unreduced(node: torch.fx.Node, layout: P) -> None:
    """ShardingError naming the annotation to write where `layout` is a partial sum."""
    if layout.unreduced:
        raise ShardingError(
            f"{where(node)}: an operand is still a partial sum over {'+'.join(sorted(layout.unreduced))} ({layout}) "
            "and this op is not linear in it. Write constrain(x, P(...)) on the operand: over a sharded dimension it "
            "becomes a reduce-scatter, over none an all-reduce"
        )


def pointwise(node: torch.fx.Node, shapes: list[tuple[int, ...]], layouts: list[P], out: tuple[int, ...]) -> P:
    """Broadcasting ops: every operand that has a dimension must shard it alike."""
    dims: list[tuple[str, ...]] = []
    for dim, size in enumerate(out):
        back = len(out) - dim
        here = {
            lay.axes(len(s) - back)
            for s, lay in zip(shapes, layouts, strict=True)
            if len(s) >= back and s[-back] == size
        }
        if len(here) > 1:
            raise ShardingError(
                f"{where(node)}: operands are sharded differently in dimension {dim}: {layouts}. Write a "
                "constrain(...) or reshard_as(...) that gives them one sharding"
            )
        dims.append(next(iter(here), ()))
    return P.of(dims, _pending(node, layouts), _blocks(node, shapes, layouts, out))


def _blocks(
    node: torch.fx.Node, shapes: list[tuple[int, ...]], layouts: list[P], out: tuple[int, ...]
) -> tuple[int, ...]:
    """How dimension 0 of the result is dealt out: as that of every operand that has it."""
    whole = [len(s) == len(out) and s[:1] == out[:1] != (1,) for s in shapes]
    dealt = {layout.blocks for has, layout in zip(whole, layouts, strict=True) if has}
    if len(dealt) > 1:
        raise ShardingError(f"{where(node)}: its operands hold other layers on each stage: {layouts}")
    return next(iter(dealt), ())


def _pending(node: torch.fx.Node, layouts: list[P]) -> frozenset[str]:
    """Axes over which the result of a pointwise op is still a sum."""
    sums = [layout.unreduced for layout in layouts]
    if node.target in SHAPE_ONLY or not any(sums):
        return frozenset()
    one_factor = node.target is aten.mul.Tensor or (node.target is aten.div.Tensor and not any(sums[1:]))
    if node.target in LIKE_COPY or (one_factor and sum(map(bool, sums)) == 1):
        return next(filter(None, sums))
    if node.target in ADDITIVE and len(sums) == 2 and sums[0] == sums[1]:
        return sums[0]
    if node.target in ADDITIVE:
        raise ShardingError(
            f"{where(node)}: a partial sum and a finished value cannot be added: {layouts}. Write constrain(x, P(...)) "
            "on the pending one"
        )
    refuse_unreduced(node, next(layout for layout in layouts if layout.unreduced))
    raise AssertionError


def reduction(node: torch.fx.Node, layout: P, dims: list[int] | None, keepdim: bool) -> P:
    """aten.sum over `dims` (all of them): a sharded dimension that is summed leaves the result unreduced."""
    summed = set(range(len(layout))) if dims is None else {d % len(layout) for d in dims}
    over = [axis for d in summed for axis in layout.axes(d)]
    kept = [() if d in summed else layout.axes(d) for d in range(len(layout)) if keepdim or d not in summed]
    return P.of(kept, [*over, *layout.unreduced], () if 0 in summed else layout.blocks)


def together(node: torch.fx.Node, layouts: list[P]) -> P:
    """Operands of a stack: all alike."""
    if len(set(layouts)) > 1:
        raise ShardingError(f"{where(node)}: parts are sharded differently: {sorted(set(map(str, layouts)))}")
    return layouts[0]
