"""Sums that one call of a body hands to the next are added where they are.

    graph microbatch(%sum, %tokens, %w) {           graph microbatch(%sum, %tokens, %w) {
      %g = ...                                        %g = ...
      %new = add(%sum, %g)                    ->      %new = add(%sum, %g)
      return %new                                     %same = copy_(%sum, %new)
    }                                                 return %same
                                                    }

That is right where nothing else reads the memory of a sum: each has one reader, and the first was made for it. The
graphs must be aten's, whose schemas say what is a view.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from typing import Any

import torch

from kernels.repeat import call, group
from llama_fn import compat
from llama_fn.compiler import calls, ir

ADD, COPY = torch.ops.aten.add.Tensor, torch.ops.aten.copy_.default
Value = tuple[torch.fx.Node, int]  # a node and which of its results


def add_in_place(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm`, whose every op is in a body, with such sums copied into the operand that they are added to."""
    operands = {node: _flat(node.args[1:]) for node in ir.calls(gm.graph) if calls.is_call(node)}
    readers = Counter(value for values in operands.values() for value in values)
    readers.update(_flat(ir.results(gm.graph)))
    readers.update(x for node in ir.calls(gm.graph) if node not in operands and not calls.is_packing(node)
                   for x in _flat(node.args))  # fmt: skip
    sites: dict[torch.fx.GraphModule, list[torch.fx.Node]] = defaultdict(list)
    for node in operands:
        sites[calls.body_of(gm, node)].append(node)
    fresh: set[Value] = set()
    for body, nodes in sites.items():
        owned = [i for i, result in enumerate(ir.results(body.graph)) if _owned(body, result)]
        fresh |= {(node, i) for node in nodes for i in owned}
    for body, nodes in sites.items():
        inputs = ir.placeholders(body.graph)
        for result in dict.fromkeys(ir.results(body.graph)):
            for position in [inputs.index(x) for x in ir.operands(result) if x in inputs and result.target is ADD]:
                given = [operands[node][position] for node in nodes]
                if len(inputs[position].users) == 1 and all(x in fresh and readers[x] == 1 for x in given):
                    _copy_back(body.graph, inputs[position], result)
                    break
    return gm


def _flat(args: object) -> list[Value]:
    """The values that arguments name, those in groups and lists, and all results of calls, included."""
    if isinstance(args, (list, tuple)):
        return [value for each in args for value in _flat(each)]
    if not isinstance(args, torch.fx.Node):
        return []
    if args.target is group:
        return _flat(args.args)
    if args.target is operator.getitem:
        source: Any = args.args[0]
        which = range(len(source.meta["val"]))[args.args[1]]  # type: ignore[index]
        return [(source, i) for i in ([which] if isinstance(which, int) else which)]
    return [(args, i) for i in range(len(args.meta["val"]) if args.target is call else 1)]


def _owned(gm: torch.fx.GraphModule, node: torch.fx.Node, view: torch.fx.Node | None = None) -> bool:
    """Whether an op of `gm` made the memory of a value, and nothing else is a view of it, as schemas say; `view` is one
    that does not count."""
    others = [
        user for user in node.users if user is not view and (ir.may_be_view(user) or (view and user.op == "output"))
    ]
    if node.op != "call_function" or others:
        return False
    source = node.args[0] if ir.may_be_view(node) else None
    if not isinstance(source, torch.fx.Node):
        return source is None
    if source.target is compat.INVOKE_SUBGRAPH:
        body = getattr(gm, source.args[0].target)  # type: ignore[union-attr, arg-type]
        return _owned(body, ir.results(body.graph)[node.args[1]])  # type: ignore[index]
    if node.target is operator.getitem and not ir.may_be_view(source):
        return source.op == "call_function"  # one of an op's results, each of which is new
    return _owned(gm, source, node)


def _copy_back(graph: torch.fx.Graph, old: torch.fx.Node, new: torch.fx.Node) -> None:
    with graph.inserting_before(ir.output_node(graph)):
        same = graph.call_function(COPY, (old, new))
    same.meta = dict(new.meta)
    new.replace_all_uses_with(same, delete_user_cb=lambda user: user.op == "output")
