"""Graphs that call graphs: what a step repeats is a body of its own, and each call of it one node (kernels/repeat.py).

    graph step {
      %c0 = call(%microbatch, %params, %tokens0)        # microbatch/0
      %c1 = call(%microbatch, %c0, %tokens1, %params)   # microbatch/1
    }

A body is a submodule. Its ops carry scopes relative to those of its calls. What looks at every op of a graph, however
often it runs, goes through :func:`counted`; what must see the ops of each call in their order writes the calls out
with :func:`inlined`, of like calls in a row a few alone with shorten.py.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.repeat import call, flat, group
from kernels.scope_names import without_numbers
from llama_fn import compat
from llama_fn.compiler import ir

_Values = dict[torch.fx.Node, Any]  # a node, or several for what a call or a group gives


def is_call(node: torch.fx.Node) -> bool:
    """Whether a node calls a body."""
    return node.op == "call_function" and node.target is call


def body_of(gm: torch.fx.GraphModule, node: torch.fx.Node) -> torch.fx.GraphModule:
    """The graph that a call of `gm` runs."""
    body = getattr(gm, node.args[0].target)  # type: ignore[union-attr, arg-type]
    assert isinstance(body, torch.fx.GraphModule)
    return body


def counted(gm: torch.fx.GraphModule, times: int = 1) -> Iterator[tuple[torch.fx.Node, int]]:
    """Every op of `gm` and of the bodies that it calls, in order, with how often it runs; a body's ops stand at its
    first call, in that call's scope."""
    sites = Counter(node.args[0] for node in ir.calls(gm.graph) if is_call(node))
    for node in ir.calls(gm.graph):
        if is_call(node):
            count = sites.pop(node.args[0], 0)
            if count:
                yield from counted(_in_scope(body_of(gm, node), ir.scope_of(node)), times * count)
        elif not is_packing(node):
            yield node, times


def bodies(gm: torch.fx.GraphModule) -> dict[torch.fx.GraphModule, str]:
    """The bodies that `gm` calls, in the order of their first calls, and the scope of all calls of each: that of the
    first, its numbers taken for any."""
    scopes: dict[torch.fx.GraphModule, str] = {}
    for node in filter(is_call, ir.calls(gm.graph)):
        scopes.setdefault(body_of(gm, node), without_numbers(ir.scope_of(node)))
    return scopes


def put_in_scope(body: torch.fx.GraphModule, scope: str) -> None:
    """Label the ops of a body, and of what it calls, by the scope of its calls."""
    for each in (*ir.subgraphs(body), body):
        for node in each.graph.nodes:
            node.meta["custom"] = {**compat.labels(node), "scope": joined(scope, ir.scope_of(node))}


def is_packing(node: torch.fx.Node) -> bool:
    """Whether a node is a call, puts values together for calls, or takes their results apart: no op of its own."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, torch.fx.Node) and source.target in (call, group)


def called_once(gm: torch.fx.GraphModule) -> set[torch.fx.GraphModule]:
    """The bodies that a single node of `gm`, or of another of its bodies, calls."""
    sites: Counter[torch.fx.GraphModule] = Counter()
    for each in {gm: None, **dict.fromkeys(_bodies(gm))}:
        sites.update(body_of(each, node) for node in ir.calls(each.graph) if is_call(node))
    return {body for body, count in sites.items() if count == 1}


def _bodies(gm: torch.fx.GraphModule) -> Iterator[torch.fx.GraphModule]:
    for child in gm.children():
        if isinstance(child, torch.fx.GraphModule):
            yield child
            yield from _bodies(child)


def inlined(
    gm: torch.fx.GraphModule, which: Callable[[torch.fx.GraphModule], bool] = lambda body: True
) -> torch.fx.GraphModule:
    """`gm` with the calls of bodies that `which` chooses, by default all, written out."""
    return _Writer(which).module(gm)


def _in_scope(body: torch.fx.GraphModule, scope: str) -> torch.fx.GraphModule:
    """A copy of a body as a call in this scope runs it."""
    return _Writer(lambda _: False).module(body, scope)


@dataclass(frozen=True)
class _Place:
    """Where a body's ops come to stand: in the scope of its call, and in the remat region that this is in."""

    scope: str = ""
    region: str = ""

    def scope_of(self, node: torch.fx.Node) -> str:
        return joined(self.scope, str(compat.labels(node).get("scope", "")))

    def region_of(self, node: torch.fx.Node) -> str:
        region = str(compat.labels(node).get("region", ""))
        return joined(self.scope, region) if region else self.region

    def of_call(self, node: torch.fx.Node) -> _Place:
        return _Place(self.scope_of(node), self.region_of(node))


class _Writer:
    """Copies graphs, some of their calls written out."""

    def __init__(
        self,
        which: Callable[[torch.fx.GraphModule], bool],
        kept: dict[torch.fx.GraphModule, torch.fx.GraphModule] | None = None,
    ) -> None:
        self.which = which
        self.kept = {} if kept is None else kept  # bodies that stay, and their copies
        self.root, self.graph = torch.nn.Module(), torch.fx.Graph()
        self.attributes: dict[torch.fx.GraphModule, torch.fx.Node] = {}

    def module(self, gm: torch.fx.GraphModule, scope: str = "") -> torch.fx.GraphModule:
        inputs = [self._copy(node, {}) for node in ir.placeholders(gm.graph)]
        out = ir.output_node(gm.graph)
        new = self.graph.output(self._written(gm, inputs, _Place(scope)))
        new.meta = copy.copy(out.meta)
        return compat.graph_module(self.root, self.graph)

    def _written(self, gm: torch.fx.GraphModule, operands: Sequence[Any], place: _Place) -> list[Any]:
        """The results of `gm`, its ops copied."""
        values: _Values = dict(zip(ir.placeholders(gm.graph), operands, strict=True))
        for node in gm.graph.nodes:
            source = node.args[0] if node.target is operator.getitem else None
            if node.op in ("placeholder", "output"):
                continue
            elif node.op == "get_attr":
                values[node] = self._attribute(gm, node)
            elif node.target is group:
                values[node] = _Group(_mapped(node.args, values), node)
            elif is_call(node):
                values[node] = self._call(gm, node, values, place)
            elif isinstance(source, torch.fx.Node) and isinstance(values[source], (list, tuple)):
                values[node] = values[source][node.args[1]]
            else:
                values[node] = self._copy(node, values, place)
        return [values[result] for result in ir.results(gm.graph)]

    def _call(self, gm: torch.fx.GraphModule, node: torch.fx.Node, values: _Values, place: _Place) -> Any:
        body, operands = body_of(gm, node), _mapped(node.args[1:], values)
        if self.which(body):
            return self._written(body, flat(operands), place.of_call(node))
        for several in operands:
            if isinstance(several, _Group) and several.new is None:
                several.new = self._copy(several.node, values, place)
        groups = {x.node: x.new for x in operands if isinstance(x, _Group)}
        return self._copy(node, {x: values[x] for x in ir.operands(node)} | groups, place)

    def _attribute(self, gm: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
        value = getattr(gm, str(node.target))
        if not isinstance(value, torch.fx.GraphModule):
            setattr(self.root, str(node.target), value)
            return self._copy(node, {})
        if self.which(value):
            return None
        if value not in self.kept:
            self.kept[value] = _Writer(self.which, self.kept).module(value)
        if value not in self.attributes:
            name = compat.add_body(self.root, str(node.target), self.kept[value])
            self.attributes[value] = self.graph.get_attr(name)
        return self.attributes[value]

    def _copy(self, node: torch.fx.Node, values: _Values, place: _Place | None = None) -> torch.fx.Node:
        args, kwargs = _mapped(node.args, values), _mapped(node.kwargs, values)
        new = self.graph.create_node(node.op, node.target, tuple(args), kwargs, node.name, node.type)
        new.meta = copy.copy(node.meta)
        if place and place.scope:
            new.meta["custom"] = compat.labels(node) | {"scope": place.scope_of(node), "region": place.region_of(node)}
        return new


class _Group(list[Any]):
    """Values that stand together in the graph that is copied, and, once a call needs it, their node in the copy."""

    def __init__(self, values: Sequence[Any], node: torch.fx.Node) -> None:
        super().__init__(values)
        self.node = node
        self.new: torch.fx.Node | None = None


def _mapped(args: Any, values: _Values) -> Any:
    """Arguments with nodes replaced by what stands for them, which may be several."""
    if isinstance(args, torch.fx.Node):
        return values[args]
    if isinstance(args, (tuple, list)):
        return [_mapped(each, values) for each in args]
    return {key: _mapped(each, values) for key, each in args.items()} if isinstance(args, dict) else args


def joined(scope: str, inner: str) -> str:
    """The scope of an op whose body is called in `scope`."""
    return "/".join(filter(None, (scope, inner)))
