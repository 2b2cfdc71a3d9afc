"""The graphs of repeated functions (kernels/repeat.py), each traced once: the bodies that nodes of a trace call.

    %a = call(%microbatch, %x0, %w)  # microbatch/0
    %b = call(%microbatch, %x1, %w)  # microbatch/1

A body's scopes are relative to those of its calls; llama_fn/compiler/calls.py reads them. The body of an inlined
function is marked so in its graph's meta, for whoever writes its calls out (:func:`is_inlined`).
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)

from kernels.repeat import call, group
from kernels.scope import Location, at
from llama_fn.compat.sources import sourced

_INLINED = "llama_fn_inlined"


class Body:
    """A graph. While another is traced, it is the target of the nodes that stand for its calls."""

    def __init__(self, name: str, gm: torch.fx.GraphModule, inlined: bool) -> None:
        self.__name__ = name
        self.gm = gm
        gm.meta[_INLINED] = inlined

    def __call__(self, operands: Sequence[Any]) -> Any:
        """The proxy of one call."""
        proxy = tracer().create_proxy("call_function", self, tuple(operands), {})
        proxy.node.meta["val"] = tuple(output(self.gm).meta["vals"])
        return proxy

    def results(self, proxy: Any, count: int | None = None) -> list[torch.Tensor]:
        """What a call returns, or the first of it, as tensors that are traced on."""
        with disable_proxy_modes_tracing():
            results = [like(value) for value in output(self.gm).meta["vals"][:count]]
        for i, result in enumerate(results):
            track_tensor_tree(result, self.result(proxy, i), constant=None, tracer=tracer())
        return results

    def result(self, proxy: Any, i: int) -> Any:
        """The proxy of one of a call's results."""
        # What is written out leaves the names alone that other ops would have without it.
        name = "result" if is_inlined(self.gm) else None
        result = tracer().create_proxy("call_function", operator.getitem, (proxy, i), {}, name)
        result.node.meta["val"] = output(self.gm).meta["vals"][i]
        return result


def graph_of(
    fn: Callable[..., Any], flat_fn: Callable[..., Any], leaves: Sequence[torch.Tensor], here: Location
) -> torch.fx.GraphModule:
    """The graph of `flat_fn(*leaves)`, which calls `fn`; ValueError where that uses other tensors."""
    decompositions = get_proxy_mode().decomposition_table  # type: ignore[union-attr]
    with disable_proxy_modes_tracing(), at(Location(phase=here.phase, source=here.source)):
        made = make_fx(sourced(flat_fn), decompositions, tracing_mode="real")(*map(like, leaves))
    gm = with_bodies(made)
    bodies = dict(gm.named_children())
    if any(node.op == "get_attr" and node.target not in bodies for node in gm.graph.nodes):
        raise ValueError(
            f"{name_of(fn)} is traced once for several calls and uses tensors that are not among its arguments. Pass "
            "them as arguments."
        )
    return gm


def with_bodies(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm` with calls of bodies that are its submodules."""
    graph, root = torch.fx.Graph(), torch.nn.Module()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    bodies: dict[Body, torch.fx.Node] = {}
    for node in gm.graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if isinstance(node.target, Body):
            if node.target not in bodies:
                bodies[node.target] = graph.get_attr(add_body(root, node.target.__name__, node.target.gm))
            new = graph.call_function(call, (bodies[node.target], *args))
        else:
            new = graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
            if node.op == "get_attr":
                setattr(root, str(node.target), getattr(gm, str(node.target)))
        new.meta = copy.copy(node.meta)
        if node.target is group:
            new.meta["val"] = tuple(each.meta["val"] for each in args)
        values[node] = new
    made = _LazyGraphModule(root, graph)
    out = output(made)
    out.meta["vals"] = [x.meta["val"] if isinstance(x, torch.fx.Node) else None for x in out.args[0]]  # type: ignore
    return made


def add_body(root: torch.nn.Module, name: str, body: torch.fx.GraphModule) -> str:
    """Make `body` a submodule of that name, or of the name and a number; returns which."""
    free, number = name, 0
    while hasattr(root, free):  # a module has names of its own, such as double
        number += 1
        free = f"{name}_{number}"
    root.add_module(free, body)
    return free


def is_inlined(gm: torch.fx.GraphModule) -> bool:
    """Whether a body's calls are to be written out."""
    return bool(gm.meta.get(_INLINED))


def name_of(fn: Callable[..., Any]) -> str:
    """A function's name, for errors."""
    return str(getattr(fn, "__qualname__", fn))


def body_name(fn: Callable[..., Any]) -> str:
    """A function's name, for its body."""
    return re.sub(r"\W+", "_", name_of(fn).rpartition(".")[2]).strip("_")


def tracer() -> Any:
    """Who makes the nodes of the innermost trace."""
    return get_proxy_mode().tracer  # type: ignore[union-attr]


def output(gm: torch.fx.GraphModule) -> torch.fx.Node:
    """The node of its results."""
    return next(iter(reversed(gm.graph.nodes)))


def like(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides, dtype and device."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
