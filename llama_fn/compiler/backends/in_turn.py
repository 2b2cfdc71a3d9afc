"""Runs a graph that does nothing but call bodies, each of them compiled once (compiler/pieces.py makes such graphs)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kernels.repeat import flat
from llama_fn.compiler import calls, ir

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]  # empties the list: what it has read, it can free


def in_turn(gm: torch.fx.GraphModule, bodies: Mapping[torch.fx.GraphModule, Run]) -> Run:
    """A function of the inputs of `gm` that calls `bodies` in its order. A value is let go by the call that reads it
    last."""
    nodes, inputs, dying = ir.calls(gm.graph), ir.placeholders(gm.graph), ir.dying(gm.graph)
    runs = {node: bodies[calls.body_of(gm, node)] for node in nodes if calls.is_call(node)}

    def run(given: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        values: dict[torch.fx.Node, Any] = dict(zip(inputs, given, strict=True))
        given.clear()
        for node in nodes:
            if node in runs:
                operands = flat([_values(each, values) for each in node.args[1:]])
                for value in dying[node]:
                    del values[value]
                values[node] = runs[node](operands)
                continue
            if node.target is operator.getitem:
                values[node] = values[node.args[0]][node.args[1]]  # type: ignore[index]
            else:  # a group
                values[node] = _values(node.args, values)
            for value in dying[node]:
                del values[value]
        return [values[node] for node in ir.results(gm.graph)]

    return run


def _values(arg: Any, values: Mapping[torch.fx.Node, Any]) -> Any:
    return [_values(each, values) for each in arg] if isinstance(arg, (list, tuple)) else values[arg]
