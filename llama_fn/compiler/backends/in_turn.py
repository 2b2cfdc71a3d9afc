"""Runs a graph that does nothing but call bodies, each of them compiled once, and speak with other stages of a pipeline
(compiler/pieces.py makes such graphs). What is done in which order is plain data, so that it can be kept on disk."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from kernels.registry import KERNELS
from kernels.repeat import flat
from llama_fn.compiler import calls, ir
from llama_fn.distributed import Messages

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]  # empties the list: what it has read, it can free
CALL, ITEM, GROUP = "call", "item", "group"


@dataclass(frozen=True)
class Order:
    """What is done, in order, as JSON can hold it. Values are "%0", "%1" and so on: the inputs, then what steps give.

    A step is what is done, its arguments, and the values that nobody reads later. What: CALL of a body, by its number,
    with values or lists of them; ITEM of a value; GROUP of values; or the name of an op between stages.
    """

    inputs: int
    steps: Sequence[tuple[str, Sequence[Any], Sequence[str]]]
    results: Sequence[str]

    @classmethod
    def of(cls, gm: torch.fx.GraphModule, bodies: Sequence[torch.fx.GraphModule], between: Sequence[str]) -> Order:
        """That of a graph, whose calls are of `bodies`; `between`: the names of the ops between stages."""
        inputs, nodes, dying = ir.placeholders(gm.graph), ir.calls(gm.graph), ir.dying(gm.graph)
        names = {node: f"%{i}" for i, node in enumerate([*inputs, *nodes])}
        steps = []
        for node in nodes:
            last = [names[value] for value in dying[node]]
            if calls.is_call(node):
                args = [bodies.index(calls.body_of(gm, node)), *_named(node.args[1:], names)]
                steps.append((CALL, args, last))
                continue
            own = str(node.target)
            what = own if own in between else ITEM if node.target is operator.getitem else GROUP
            steps.append((what, _named(node.args, names), last if node.users else [*last, names[node]]))
        return cls(len(inputs), steps, [names[node] for node in ir.results(gm.graph)])


def in_turn(
    gm: torch.fx.GraphModule, bodies: Mapping[torch.fx.GraphModule, Run],
    between: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> Run:  # fmt: skip
    """A function of the inputs of `gm` that calls `bodies` in its order, and `between` them by op what goes to other
    stages."""
    named = {str(op): form for op, form in between.items()}
    return follow(Order.of(gm, list(bodies), list(named)), list(bodies.values()), named)


def follow(
    order: Order, bodies: Sequence[Run], between: Mapping[str, Callable[..., Any]] = MappingProxyType({})
) -> Run:
    """A function that does what `order` says. A value is let go by the step that reads it last."""

    def run(given: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        values: dict[str, Any] = {f"%{i}": x for i, x in enumerate(given)}
        given.clear()
        for number, (what, args, last) in enumerate(order.steps, order.inputs):
            if what == CALL:
                operands = flat([_values(each, values) for each in args[1:]])
                for value in last:
                    del values[value]
                values[f"%{number}"] = bodies[args[0]](operands)
                continue
            read = _values(args, values)
            values[f"%{number}"] = read[0][read[1]] if what == ITEM else read if what == GROUP else between[what](*read)
            del read
            for value in last:
                del values[value]
        return [values[name] for name in order.results]

    return run


def between_stages(
    messages: Messages | None, collectives: Mapping[str, Callable[..., Any]]
) -> dict[Any, Callable[..., Any]]:
    """By op, how this process does what stages of a pipeline do together: `collectives` by name, and messages; nothing
    without a pipeline."""
    if messages is None:
        return {}
    return {KERNELS[name].op: form for name, form in collectives.items()} | dict(messages.forms)


def _named(arg: Any, names: Mapping[torch.fx.Node, str]) -> Any:
    """An argument with names for the values in it."""
    if isinstance(arg, (list, tuple)):
        return [_named(each, names) for each in arg]
    return names[arg] if isinstance(arg, torch.fx.Node) else arg


def _values(arg: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_values(each, values) for each in arg]
    return values[arg] if isinstance(arg, str) and arg.startswith("%") else arg
