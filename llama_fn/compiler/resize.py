"""The graph of a step for another batch size, without tracing it again.

    %y = einsum("btf,fd->btd", %h, %w)  f32[8,2048,4096]   ->   f32[16,2048,4096]

No op names the extent of an axis that rules shard, as the batch: sharding/partition.py lives by that too. Of the length
of a sequence it is not true: the table of rotary embeddings is made for one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.model.arrays import ArrayInfo
from sharding.abstract_eval import AbstractEval
from sharding.errors import where


def resized(gm: torch.fx.GraphModule, infos: Sequence[ArrayInfo]) -> torch.fx.GraphModule:
    """`gm` for arguments like `infos`; ValueError naming an op that does not take the new size."""
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    inputs = iter(infos)
    made = AbstractEval.of(compat.node_value(ir.placeholders(gm.graph)[0]))
    for node in gm.graph.nodes:
        new = values[node] = graph.node_copy(node, values.__getitem__)
        new.meta = copy.copy(node.meta)
        if node.op == "placeholder":
            new.meta["val"] = compat.node_value(node).new_empty(next(inputs).shape)
        elif node.op == "call_function":
            try:
                new.meta["val"] = made.result(new.target, new.args, new.kwargs)
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                raise ValueError(f"{where(node)} does not take this size; trace for it instead: {error}") from error
    return compat.graph_module(gm, graph)


def without_extent(info: ArrayInfo, axis: str) -> ArrayInfo:
    """`info` as if dimensions along this logical axis had one element."""
    axes = info.axes or (None,) * len(info.shape)
    return replace(info, shape=tuple(1 if a == axis else n for n, a in zip(info.shape, axes, strict=True)))
