"""Tracing once what a step repeats: every call of a function is one node, which names the graph of its first call.

    %a = call(%microbatch, %x0, %w)  # microbatch/0
    %b = call(%microbatch, %x1, %w)  # microbatch/1

A body's scopes are relative to those of its calls. kernels/repeat.py says what functions may be repeated, and what the
nodes mean; llama_fn/compiler/calls.py reads them.
"""

from __future__ import annotations

import copy
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

from kernels.repeat import call, folded, group
from kernels.scope import Location, at, current, named_scope
from llama_fn import tree
from llama_fn.compat.sources import sourced


class Repeats:
    """What one trace knows of the repeated functions that are called in it (kernels/repeat.py)."""

    def __init__(self) -> None:
        self.bodies: dict[Any, _Body] = {}

    def call(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Traced the first time, a node each time; run as it is inside a gradient, a remat region or a real
        computation."""
        leaves, spec = tree.flatten((args, kwargs))
        if not _is_traced(leaves):
            return fn(*args, **kwargs)
        body = self._body(fn, spec, leaves)
        return body.results(body([_proxy(x) for x in leaves]))

    def fold(self, fn: Callable[..., Any], total: Any, parts: Sequence[Any], args: Any, scopes: Sequence[str]) -> Any:
        """A node for each part; only the results of the last are taken apart."""
        leaves, spec = tree.flatten(((total, parts[0], *args), {}))
        if not _is_traced(leaves):
            return folded(fn, total, parts, args, scopes)
        body = self._body(fn, spec, leaves)
        taken, structure = tree.flatten(total)
        returned = _output(body.gm).meta["vals"]
        if body.out_spec != structure or any(_kind(x) != _kind(y) for x, y in zip(taken, returned, strict=True)):
            raise ValueError(
                f"{_name(fn)} is folded over parts and takes a total of {[*map(_kind, taken)]}, but returns "
                f"{[*map(_kind, returned)]}. Return the structure, shapes and dtypes that it takes"
            )
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        state: Any = [_proxy(x) for x in taken]
        shared = tracer.create_proxy("call_function", group, tuple(_proxy(x) for x in tree.flatten(args)[0]), {})
        for part, scope in zip(parts, scopes, strict=True):
            with named_scope(scope):
                state = body([state, *(_proxy(x) for x in tree.flatten(part)[0]), shared])
        return body.results(state)

    def _body(self, fn: Callable[..., Any], spec: tree.TreeSpec, leaves: Sequence[torch.Tensor]) -> _Body:
        here = current()
        key = (fn, spec, here.phase, here.source, tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves))
        if key not in self.bodies:
            self.bodies[key] = _Body(fn, spec, leaves, here)
        return self.bodies[key]


def _is_traced(leaves: Sequence[Any]) -> bool:
    return get_proxy_mode() is not None and not current().region and all(map(_plain, leaves))


def _plain(x: Any) -> bool:
    """A tensor that nothing differentiates."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return isinstance(x, torch.Tensor) and not inside and not x.requires_grad


def _proxy(x: torch.Tensor) -> Any:
    return get_proxy_mode().tracer.unwrap_proxy(x)  # type: ignore[union-attr]


def _kind(x: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(x.shape), x.dtype


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", fn))


class _Body:
    """The graph of one function. While a graph is traced, it is the target of the nodes that stand for its calls."""

    def __init__(
        self, fn: Callable[..., Any], spec: tree.TreeSpec, leaves: Sequence[torch.Tensor], here: Location
    ) -> None:
        def flat_fn(*flat: torch.Tensor) -> list[torch.Tensor]:
            args, kwargs = tree.unflatten(spec, flat)
            out, self.out_spec = tree.flatten(fn(*args, **kwargs))
            return out

        self.__name__ = re.sub(r"\W+", "_", _name(fn).rpartition(".")[2]).strip("_")
        decompositions = get_proxy_mode().decomposition_table  # type: ignore[union-attr]
        with disable_proxy_modes_tracing(), at(Location(phase=here.phase, source=here.source)):
            gm = make_fx(sourced(flat_fn), decompositions, tracing_mode="real")(*map(_like, leaves))
        self.gm = with_bodies(gm)
        if any(node.op == "get_attr" for node in gm.graph.nodes):
            raise ValueError(
                f"{_name(fn)} is traced once for several calls and uses tensors that are not among its arguments. Pass "
                "them as arguments."
            )

    def __call__(self, operands: Sequence[Any]) -> Any:
        """The proxy of one call."""
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        proxy = tracer.create_proxy("call_function", self, tuple(operands), {})
        proxy.node.meta["val"] = tuple(_output(self.gm).meta["vals"])
        return proxy

    def results(self, proxy: Any) -> Any:
        """What a call returns, as tensors that are traced on."""
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        with disable_proxy_modes_tracing():
            results = [_like(value) for value in _output(self.gm).meta["vals"]]
        track_tensor_tree(results, proxy, constant=None, tracer=tracer)
        proxy.node.meta["val"] = tuple(results)
        return tree.unflatten(self.out_spec, results)


def with_bodies(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm` with calls of bodies that are its submodules."""
    graph, root = torch.fx.Graph(), torch.nn.Module()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    bodies: dict[_Body, torch.fx.Node] = {}
    for node in gm.graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if isinstance(node.target, _Body):
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
    out = _output(made)
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


def _output(gm: torch.fx.GraphModule) -> torch.fx.Node:
    return next(iter(reversed(gm.graph.nodes)))


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
