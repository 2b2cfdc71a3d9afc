"""Reading and printing step graphs: one line per node with shape, scope, phase and source."""

from __future__ import annotations

import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels import repeat
from kernels.scope_names import Scope, layer, parse
from llama_fn import compat
from llama_fn.errors import nearest
from llama_fn.model.arrays import describe

log = logging.getLogger("llama_fn.ir")
LARGE = 300  # ops of a graph that ought to have layers: one layer with its backward and its part of AdamW has as many
_PACKING = (repeat.call, repeat.group)  # of which a step's gradients may be results
PHASES = ("forward", "backward", "optimizer")


def scope_of(node: torch.fx.Node) -> str:
    """ "microbatch/0/layers/3/mlp", or ""."""
    return str(compat.labels(node).get("scope", ""))


def place_of(node: torch.fx.Node) -> Scope:
    """Its scope, taken apart."""
    return parse(scope_of(node))


def warn_without_layers(nodes: Sequence[torch.fx.Node], reader: str, cost: str) -> None:
    """Say that `reader`, which looks for numbered layers, finds none among ops that are enough to have some."""
    if len(nodes) >= LARGE and not any(place_of(node).is_layer for node in nodes):
        log.warning(
            "%s finds no layer in this graph of %d ops, so %s. It looks for scopes of a name and a number, such as "
            "%s: name each layer of the model with kernels.scope_names.layer(i)", reader, len(nodes), cost, layer(0),
        )  # fmt: skip


def phase_of(node: torch.fx.Node) -> str:
    """forward, backward or optimizer."""
    return str(compat.labels(node).get("phase", "forward"))


MADE_BY = "pass"  # the label of an op that a pass made of its own accord


def made_by(node: torch.fx.Node) -> str:
    """The pass that asked for a collective: partition, unless a later one says so."""
    return str(compat.labels(node).get(MADE_BY, "partition"))


def label(node: torch.fx.Node, like: torch.fx.Node) -> None:
    """Give `node` the scope, phase and source of another."""
    node.meta["custom"] = dict(compat.labels(like))


def placeholders(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The graph's inputs, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: torch.fx.Graph) -> torch.fx.Node:
    """The node that returns the results, which is the last."""
    last = next(iter(reversed(graph.nodes)))
    assert last.op == "output", f"a pass left {last} behind the output"
    return last


def results(graph: torch.fx.Graph) -> list[Any]:
    """The graph's flat results."""
    return list(output_node(graph).args[0])  # type: ignore[arg-type]


def calls(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The graph's ops, in order."""
    return [node for node in graph.nodes if node.op == "call_function"]


def written(graph: torch.fx.Graph) -> list[int]:
    """Positions of the donated inputs, which the graph overwrites at its end."""
    targets = {node.args[0] for node in calls(graph) if node.target is torch.ops.aten.copy_.default}
    return [i for i, node in enumerate(placeholders(graph)) if node in targets]


def operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The distinct nodes among a node's arguments, in argument order.

    Unlike `Node.all_input_nodes`, whose order changes when an argument is replaced.
    """
    nodes: dict[torch.fx.Node, None] = {}
    torch.fx.node.map_arg((node.args, node.kwargs), lambda n: nodes.setdefault(n))
    return list(nodes)


def may_be_view(node: torch.fx.Node) -> bool:
    """Whether a node's result may live in the memory of an operand, as the schema says that ops of torch have."""
    schema = getattr(node.target, "_schema", None)
    return node.target is operator.getitem or (schema is not None and any(x.alias_info for x in schema.returns))


def dying(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """By op the values that it reads for the last time; results, and graphs that are called, die nowhere."""
    last = {used: node for node in graph.nodes for used in node.all_input_nodes if used.op != "get_attr"}
    by_op: dict[torch.fx.Node, list[torch.fx.Node]] = defaultdict(list)
    for value, node in last.items():
        if node.op != "output":
            by_op[node].append(value)
    return by_op


def _argument(x: Any) -> str:
    if isinstance(x, torch.fx.Node):
        return f"%{x.name}"
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(_argument(item) for item in x) + "]"
    return repr(x)


def _result(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_result(item) for item in value) + ")"
    return describe(value)


def as_text(
    gm: torch.fx.GraphModule, title: str, note: Callable[[torch.fx.Node], str] = lambda _: "", scope: str = ""
) -> str:
    """The graph, readable and diffable; the graphs that it calls stand first, once each. `note(node)` is added to a
    node's line. Of a `scope` only its ops, and only graphs that have any; ValueError where none has."""
    graphs = [*subgraphs(gm).items(), (gm, title)]
    if scope:
        graphs = [(each, name) for each, name in graphs if any(_within(node, scope) for node in calls(each.graph))]
    if not graphs:
        known = {scope_of(node) for each in (gm, *subgraphs(gm)) for node in calls(each.graph)}
        raise ValueError(f"no op of {title} is in scope {scope!r}. {nearest(scope, filter(None, known))}")
    return "\n".join(_graph_text(each, name, note, scope) for each, name in graphs)


def _within(node: torch.fx.Node, scope: str) -> bool:
    """Whether its scope is `scope`, lies in it, or has it somewhere."""
    return f"/{scope.strip('/')}/" in f"/{scope_of(node)}/"


def subgraphs(gm: torch.fx.GraphModule) -> dict[torch.fx.GraphModule, str]:
    """The graphs that `gm` calls, and those that they call, with their names; callees first."""
    names: dict[torch.fx.GraphModule, str] = {}
    for name, child in gm.named_children():
        if isinstance(child, torch.fx.GraphModule):
            names = names | subgraphs(child) | {child: name}
    return names


def _graph_text(gm: torch.fx.GraphModule, title: str, note: Callable[[torch.fx.Node], str], scope: str) -> str:
    lines = [f"graph {title} {{"]
    nodes: Any = gm.graph.nodes if not scope else [node for node in calls(gm.graph) if _within(node, scope)]
    for node in nodes:
        arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
        if node.op == "placeholder":
            described = f"  %{node.name}: {describe(node.meta.get('val'))} = input {node.meta.get('path', '')}".rstrip()
            lines.append(described + _aside(note(node)))
        elif node.op == "output":
            names = node.meta.get("paths") or [""] * len(node.args[0])
            for name, value in zip(names, node.args[0], strict=True):
                lines.append(f"  return {_argument(value)} {name}".rstrip())
        elif node.op != "get_attr" or not isinstance(getattr(gm, str(node.target)), torch.fx.GraphModule):
            where = compat.labels(node)
            trail = " ".join(str(where[key]) for key in ("phase", "scope", "source", "note") if where.get(key))
            call = f"{target_text(node)}({', '.join(arguments)})"
            result = node.meta.get("val")
            several = node.target in _PACKING or (node.target is operator.getitem and isinstance(result, tuple))
            what = f"{len(result)} values" if several and result is not None else _result(result)
            lines.append(f"  %{node.name}: {what} = {call}  # {trail}{_aside(note(node))}")
    return "\n".join([*lines, "}"])


def _aside(note: str) -> str:
    return f"  | {note}" if note else ""


def target_text(node: torch.fx.Node) -> str:
    """What a node calls, by name."""
    target = node.target
    return (
        str(target)
        if isinstance(target, str) or hasattr(target, "_schema")
        else getattr(target, "__name__", str(target))
    )
