"""What is wrong with a sharding, said where it was asked for."""

from __future__ import annotations

from typing import Any

import torch

from sharding.parts import slots


class ShardingError(ValueError):
    """A sharding that does not work out: the message names op, scope, source line, shardings and what to write."""


def where(node: torch.fx.Node) -> str:
    """ "einsum in layers/3/mlp, backward (llama.py:98)" for a traced node."""
    labels = node.meta.get("custom", {})
    name = str(node.target).removeprefix("llama_fn.").removesuffix(".default")
    phase = labels.get("phase", "forward")
    source = f" ({labels['source']})" if labels.get("source") else ""
    return f"{name} in {labels.get('scope') or 'the step'}, {phase}{source}"


def local_shape(shape: tuple[int, ...], layout: Any, mesh: Any, what: str, padded: bool = False) -> list[int]:
    """Shape of a device's part; ShardingError where a dimension is not divisible.

    `padded`: rounded up instead, the last devices' parts ending in zeros. Right for what is only stored and updated
    element by element, as 12 devices share the 8192 columns of a LLaMA-65B matrix.
    """
    local = []
    for dim, size in enumerate(shape):
        axes = layout.axes(dim)
        if dim == 0 and layout.blocks:
            local.append(slots(layout.blocks, mesh.extent(axes)))
            continue
        parts = mesh.extent(axes)
        if size % parts and not padded:
            fits = [n for n in range(1, min(size, parts * 2) + 1) if size % n == 0]
            raise ShardingError(
                f"{what}: dimension {dim} of {tuple(shape)} has size {size}, which {parts} devices along "
                f"{'+'.join(axes)} do not divide. Along these axes {fits} devices would; or take a size that is a "
                f"multiple of {parts}, or rules that leave this dimension whole"
            )
        local.append(-(-size // parts))
    return local
