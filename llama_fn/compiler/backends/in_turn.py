"""Runs a graph that does nothing but call bodies, each of them compiled once, and speak with other stages of a pipeline
(compiler/pieces.py makes such graphs)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from kernels.registry import KERNELS
from kernels.repeat import flat
from llama_fn.compiler import calls, ir
from llama_fn.distributed import Messages

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]  # empties the list: what it has read, it can free


def in_turn(
    gm: torch.fx.GraphModule, bodies: Mapping[torch.fx.GraphModule, Run],
    between: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> Run:  # fmt: skip
    """A function of the inputs of `gm` that calls `bodies` in its order, and `between` them by op what goes to other
    stages. A value is let go by the call that reads it last."""
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
            if node.target in between:
                values[node] = between[node.target](*torch.fx.node.map_arg(node.args, values.__getitem__))
            elif node.target is operator.getitem:
                values[node] = values[node.args[0]][node.args[1]]  # type: ignore[index]
            else:  # a group
                values[node] = _values(node.args, values)
            for value in (*dying[node], *([] if node.users else [node])):
                del values[value]
        return [values[node] for node in ir.results(gm.graph)]

    return run


def between_stages(
    messages: Messages | None, collectives: Mapping[str, Callable[..., Any]]
) -> dict[Any, Callable[..., Any]]:
    """By op, how this process does what stages of a pipeline do together: `collectives` by name, and messages; nothing
    without a pipeline."""
    if messages is None:
        return {}
    return {KERNELS[name].op: form for name, form in collectives.items()} | dict(messages.forms)


def _values(arg: Any, values: Mapping[torch.fx.Node, Any]) -> Any:
    return [_values(each, values) for each in arg] if isinstance(arg, (list, tuple)) else values[arg]
