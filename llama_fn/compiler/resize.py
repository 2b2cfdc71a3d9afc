"""The graph of a step for another batch size, without tracing it again.

    %y = einsum("btf,fd->btd", %h, %w)  f32[8,2048,4096]   ->   f32[16,2048,4096]

No op names the extent of an axis that rules shard, as the batch: sharding/partition.py lives by that too. Of the length
of a sequence it is not true: the table of rotary embeddings is made for one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kernels.repeat import flat
from llama_fn import compat
from llama_fn.compiler import calls, ir
from llama_fn.model.arrays import ArrayInfo
from sharding.abstract_eval import AbstractEval
from sharding.errors import where


def resized(gm: torch.fx.GraphModule, infos: Sequence[ArrayInfo]) -> torch.fx.GraphModule:
    """`gm` for arguments like `infos`; ValueError naming an op that does not take the new size."""
    inputs = [compat.node_value(node) for node in ir.placeholders(gm.graph)]
    values = [x.new_empty(info.shape) for x, info in zip(inputs, infos, strict=True)]
    return _Resizing(AbstractEval.of(inputs[0])).graph_module(gm, values)


class _Resizing:
    """Copies a graph and the bodies that it calls, each body once for every kind of operands."""

    def __init__(self, made: AbstractEval) -> None:
        self.made = made
        self.bodies: dict[tuple[torch.fx.GraphModule, str], torch.fx.GraphModule] = {}

    def graph_module(self, gm: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
        graph, root, given = torch.fx.Graph(), torch.nn.Module(), iter(inputs)
        values: dict[torch.fx.Node, torch.fx.Node] = {}
        called: dict[torch.fx.GraphModule, torch.fx.Node] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                continue  # bodies come with their calls
            if calls.is_call(node):
                operands = torch.fx.node.map_arg(node.args[1:], values.__getitem__)
                shapes = flat(torch.fx.node.map_arg(operands, compat.node_value))
                body = self._body(calls.body_of(gm, node), shapes)
                if body not in called:
                    called[body] = graph.get_attr(compat.add_body(root, str(node.args[0].target), body))
                new = graph.create_node("call_function", node.target, (called[body], *operands), {}, node.name)
                new.meta = {**node.meta, "val": tuple(compat.node_value(x) for x in ir.results(body.graph))}
            else:
                new = graph.node_copy(node, values.__getitem__)
                new.meta = copy.copy(node.meta)
            values[node] = new
            if node.op == "placeholder":
                new.meta["val"] = next(given)
            elif node.op == "call_function" and not calls.is_call(node):
                new.meta["val"] = self._result(node, new)
        return compat.graph_module(root, graph)

    def _body(self, body: torch.fx.GraphModule, operands: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
        key = body, str([(x.shape, x.dtype) for x in operands])
        if key not in self.bodies:
            self.bodies[key] = self.graph_module(body, operands)
        return self.bodies[key]

    def _result(self, node: torch.fx.Node, new: torch.fx.Node) -> Any:
        try:
            return self.made.result(new.target, new.args, new.kwargs)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"{where(node)} does not take this size; trace for it instead: {error}") from error


def without_extent(info: ArrayInfo, axis: str) -> ArrayInfo:
    """`info` as if dimensions along this logical axis had one element."""
    axes = info.axes or (None,) * len(info.shape)
    return replace(info, shape=tuple(1 if a == axis else n for n, a in zip(info.shape, axes, strict=True)))
