"""Replace our ops by plain torch ops for a compiler that does not know them, in one of their forms.

    %y = llama_fn.swiglu(%g, %u)   ->   %s = aten.sigmoid(%g)
                                        %m = aten.mul(%g, %s)
                                        %y = aten.mul(%m, %u)

`forms` names the form per kernel family where it is not `reference`, `find(kernel, form)` gives it. Opaque kernels
for which no form is named stay. Aten ops with an entry in `decompositions` are replaced by it, so that the result holds
only what the compiler takes. New ops carry the scope, phase and source of the op they replace.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kernels.registry import of_node
from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.compiler.passes.dead_code import dead_code

Find = Callable[[str, str], Callable[..., Any]]
Decompositions = Mapping[Any, Callable[..., Any]]


def expand(
    gm: torch.fx.GraphModule, forms: Mapping[str, str], find: Find, decompositions: Decompositions,
    traced: dict[str, torch.fx.GraphModule] | None = None,
) -> torch.fx.GraphModule:  # fmt: skip
    """`gm` with each of our ops in the form that `forms` names and `find` has, and the aten ops of `decompositions`
    written in others. `traced` keeps what ops are written in, for graphs that share them."""
    traced = {} if traced is None else traced
    for each in (*ir.subgraphs(gm), gm):
        _expand(each, forms, find, decompositions, traced)
    return gm


def _expand(
    gm: torch.fx.GraphModule, forms: Mapping[str, str], find: Find, decompositions: Decompositions,
    traced: dict[str, torch.fx.GraphModule],
) -> None:  # fmt: skip
    """`traced`: what ops of these operands are written in."""
    for node in ir.calls(gm.graph):
        kernel = of_node(node.target)
        if kernel is None and node.target in decompositions:
            fn: Any = node.target  # traced, it comes apart by itself
        elif kernel is not None and (not kernel.opaque or kernel.name in forms):
            fn = find(kernel.name, forms.get(kernel.name.removesuffix("_bwd"), "reference"))
        else:
            continue
        key = f"{node.target}{torch.fx.node.map_arg((node.args, node.kwargs), _layout)}"
        if key not in traced:
            traced[key] = _trace(fn, node, decompositions)
        _inline(gm.graph, node, traced[key])
    gm.graph.lint()
    gm.recompile()


def _layout(node: torch.fx.Node) -> Any:
    value = compat.node_value(node)
    return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device}"


def _trace(fn: Callable[..., Any], node: torch.fx.Node, decompositions: Decompositions) -> torch.fx.GraphModule:
    """`fn` traced with the node's arguments; tensor operands are the placeholders, in order."""
    operands = ir.operands(node)

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        place = dict(zip(operands, tensors, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), place.__getitem__)
        result = fn(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else [result]
        return [r.contiguous() for r in results]  # as the op's abstract promises; views in users rely on it

    values = [compat.node_value(n) for n in operands]
    world = compat.FakeTensors.of(_first(compat.node_value(node)))  # an op that makes a tensor has no operands
    # Fresh tensors: nodes made from one traced body share their values, and tracing tells operands apart by identity.
    body = world.trace(flat, [world.like(value, str(value.device)) for value in values], decompositions)
    return dead_code(body, None)


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, (tuple, list)) else value


def _inline(graph: torch.fx.Graph, node: torch.fx.Node, body: torch.fx.GraphModule) -> None:
    values: dict[torch.fx.Node, torch.fx.Node] = dict(zip(ir.placeholders(body.graph), ir.operands(node), strict=True))
    with graph.inserting_before(node):
        for each in ir.calls(body.graph):
            values[each] = graph.node_copy(each, values.__getitem__)
            values[each].meta = {"val": each.meta["val"], "custom": compat.labels(node)}
    results = [values[r] for r in ir.results(body.graph)]
    if isinstance(compat.node_value(node), (tuple, list)):
        for user in list(node.users):
            assert user.target is operator.getitem
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(results[0])
    graph.erase_node(node)
