"""Tracing once what a step repeats: the graph of a function's first call is copied in for every further one.

A trace takes most of a millisecond for each op, a copy some hundredth of that, and microbatches are alike but for the
scope they are called in:

    %a = einsum(%x0, %w)  # microbatch/0/mlp        traced
    %b = einsum(%x1, %w)  # microbatch/1/mlp        copied
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)

from kernels.scope import Location, at, current
from llama_fn import tree
from llama_fn.compat.sources import sourced

_Nodes = dict[torch.fx.Node, Any]


class Repeats:
    """What one trace knows of the repeated functions that are called in it (kernels/repeat.py)."""

    def __init__(self) -> None:
        self.bodies: dict[Any, _Body] = {}

    def call(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Traced the first time, copied later; run as it is inside a gradient, a remat region or a real computation."""
        leaves, spec = tree.flatten((args, kwargs))
        here = current()
        if get_proxy_mode() is None or here.region or not all(map(_plain, leaves)):
            return fn(*args, **kwargs)
        key = (fn, spec, here.phase, here.source, tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves))
        if key not in self.bodies:
            self.bodies[key] = _Body(fn, spec, leaves, here)
        return self.bodies[key](leaves)


def _plain(x: Any) -> bool:
    """A tensor that nothing differentiates."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return isinstance(x, torch.Tensor) and not inside and not x.requires_grad


class _Body:
    """The graph of one call. As the target of a node of the graph being traced, it stands for a copy of itself."""

    __name__ = "repeated"

    def __init__(
        self, fn: Callable[..., Any], spec: tree.TreeSpec, leaves: Sequence[torch.Tensor], here: Location
    ) -> None:
        def flat_fn(*flat: torch.Tensor) -> list[torch.Tensor]:
            args, kwargs = tree.unflatten(spec, flat)
            out, self.out_spec = tree.flatten(fn(*args, **kwargs))
            return out

        decompositions = get_proxy_mode().decomposition_table  # type: ignore[union-attr]
        with disable_proxy_modes_tracing(), at(Location(phase=here.phase, source=here.source)):
            gm = with_repeats(make_fx(sourced(flat_fn), decompositions, tracing_mode="real")(*map(_like, leaves)))
        self.nodes = list(gm.graph.nodes)
        if any(node.op == "get_attr" for node in self.nodes):
            name = getattr(fn, "__qualname__", fn)
            raise ValueError(
                f"{name} is traced once for several calls and uses tensors that are not among its arguments. Pass them "
                "as arguments."
            )

    def __call__(self, leaves: Sequence[torch.Tensor]) -> Any:
        """Results of a call that is traced as one node."""
        tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
        proxies = tuple(tracer.unwrap_proxy(x) for x in leaves)
        proxy = tracer.create_proxy("call_function", self, proxies, {})
        with disable_proxy_modes_tracing():
            results = [_like(node.meta["val"]) for node in self.nodes[-1].args[0]]
        track_tensor_tree(results, proxy, constant=None, tracer=tracer)
        return tree.unflatten(self.out_spec, results)

    def copied(self, call: torch.fx.Node, graph: torch.fx.Graph, operands: Sequence[Any]) -> list[Any]:
        """Its results, written into `graph` for `call`."""
        values: _Nodes = {}
        inputs: Iterator[Any] = iter(operands)
        scope = call.meta.get("custom", {}).get("scope", "")
        for node in self.nodes[:-1]:
            values[node] = next(inputs) if node.op == "placeholder" else _copy(node, graph, values)
            if node.op != "placeholder":
                values[node].meta["custom"] = _joined(scope, node.meta.get("custom", {}))
        return [values[node] for node in self.nodes[-1].args[0]]


def with_repeats(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm` with what its calls of repeated functions stand for."""
    if not any(isinstance(node.target, _Body) for node in gm.graph.nodes):
        return gm
    graph, values = torch.fx.Graph(), _Nodes()
    for node in gm.graph.nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(node.target, _Body):
            values[node] = node.target.copied(node, graph, [values[x] for x in node.args])
        elif isinstance(source, torch.fx.Node) and isinstance(source.target, _Body):
            values[node] = values[source][node.args[1]]
        else:
            values[node] = _copy(node, graph, values)
    return _LazyGraphModule(gm, graph)


def _copy(node: torch.fx.Node, graph: torch.fx.Graph, values: _Nodes) -> torch.fx.Node:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    new = graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
    new.meta = copy.copy(node.meta)
    return new


def _joined(scope: str, inner: dict[str, str]) -> dict[str, str]:
    paths = {key: "/".join(filter(None, (scope, inner.get(key)))) for key in ("scope", "region")}
    return inner | {"scope": paths["scope"], "region": paths["region"] if inner.get("region") else ""}


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
