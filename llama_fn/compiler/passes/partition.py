"""From the global graph to the graph of one device: sharding/partition.py, with its errors told to the user."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_fn.errors import UserError, nearest
from llama_fn.model.arrays import ArrayInfo
from sharding import partition as sharding_partition
from sharding.errors import ShardingError
from sharding.mesh import Mesh
from sharding.rules import PRESETS, Rules
from sharding.stages import Stages


def rules_named(rules: str | Rules) -> Rules:
    """The preset of a name, or the rules themselves; UserError for an unknown name."""
    if isinstance(rules, Rules):
        return rules
    if rules not in PRESETS:
        raise UserError(f"sharding rules {rules!r} are not a preset. {nearest(rules, PRESETS)}")
    return PRESETS[rules]


def partition(
    gm: torch.fx.GraphModule,
    mesh: Mesh,
    rules: Rules,
    infos: Sequence[ArrayInfo],
    aliases: Sequence[tuple[int, int]],
    paths: Sequence[str],
    stages: Stages | None = None,
) -> sharding_partition.Partitioned:
    """The per-device graph of `gm`, whose inputs are laid out as `infos` say under the rules."""
    try:
        parts = sharding_partition.partition(gm, mesh, rules, [(info.axes, info.table) for info in infos], stages)
    except (ShardingError, ValueError) as error:
        raise UserError(f"mesh {mesh}, rules {rules.name}: {error}") from error
    for i, o in aliases:
        if parts.inputs[i] != parts.outputs[o]:
            raise UserError(
                f"mesh {mesh}, rules {rules.name}: {paths[i]} is donated in sharding {parts.inputs[i]}, but its new "
                f"value has {parts.outputs[o]}. Write reshard_as(new, old) or a constrain(...) before it is returned"
            )
    return parts
