"""This process's positions along mesh axes as inputs of its GE graphs, which all processes of a stage then share.

    %i = axis_index(%x, "model")                 %position_model: i64[1] = input
                                           ->    %i = view(%position_model, [])
    %s = own_slice(%x, "model", 4, 1)            %s = index_select(view(%x, [8, 4, 2]), 1, %position_model), viewed

As constants they would make each process's graph another: it would be compiled for each, and never be found again in a
cache by a process of another rank.
"""

from __future__ import annotations

import typing
from typing import Any

import torch

from llama_fn import compat
from llama_fn.compiler import ir
from sharding.collectives import axis_index, own_slice

BY_POSITION = ("axis_index", "own_slice")
aten = torch.ops.aten


def positions_as_inputs(gm: torch.fx.GraphModule) -> tuple[str, ...]:
    """Change `gm`; returns the axes ("data", "data+model") whose positions it now takes behind its inputs, in order."""
    inputs: dict[str, torch.fx.Node] = {}
    for node in ir.calls(gm.graph):
        if node.target not in (axis_index.op, own_slice.op):
            continue
        axes = str(node.args[1])
        if axes not in inputs:
            inputs[axes] = _input(gm.graph, axes, compat.node_value(node))
        node.replace_all_uses_with(_by_position(gm.graph, node, inputs[axes]))
        gm.graph.erase_node(node)
    gm.recompile()
    return tuple(inputs)


def _input(graph: torch.fx.Graph, axes: str, like: torch.Tensor) -> torch.fx.Node:
    """A further placeholder: int64 of shape [1]."""
    with graph.inserting_after(ir.placeholders(graph)[-1]):
        node = graph.placeholder(f"position_{axes.replace('+', '_')}")
    made = compat.FakeTensors.of(like).make((1,), torch.int64, str(like.device))
    node.meta = {"val": made, "path": f"position along {axes}"}
    return node


def _by_position(graph: torch.fx.Graph, node: torch.fx.Node, position: torch.fx.Node) -> torch.fx.Node:
    """What `node` gives, from the position."""

    def add(target: Any, *args: Any) -> torch.fx.Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, compat.node_value)
        new.meta["val"] = compat.FakeTensors.of(compat.node_value(position)).run(target, *values)
        ir.label(new, node)
        return new

    if node.target is axis_index.op:
        return add(aten.view.default, position, [])
    x, _, n, dim = node.args[0], *typing.cast(tuple[str, int, int], node.args[1:])
    shape = list(compat.node_value(typing.cast(torch.fx.Node, x)).shape)
    before, width, behind = shape[:dim], shape[dim] // n, shape[dim + 1 :]
    mine = add(aten.index_select.default, add(aten.view.default, x, [*before, n, width, *behind]), dim, position)
    return add(aten.view.default, mine, [*before, width, *behind])
