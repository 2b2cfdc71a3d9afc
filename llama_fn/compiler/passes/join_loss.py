"""Head, loss and both their gradients as one op, which holds the logits of a block of tokens at a time.

    %z = einsum("btd,vd->btv", %x, %head)           %nll, %dx, %dhead = head_loss(%g, %x, %head, %t, tokens)
    %nll, %lse = cross_entropy(%z, %t)
    ...                                       ->
    %dz = cross_entropy_bwd(%g, %z, %t, %lse)
    %dx = einsum("btv,vd->btd", %dz, %head)
    %dhead = einsum("btv,btd->vd", %dz, %x)

Logits and their gradient are the two largest values of a step. A block can go backward before the others went forward
because %g, what the loss of a token weighs, does not depend on any loss. The same holds for head_cross_entropy and its
backward, whose second product of logits this saves; its blocks are smaller, as the user asked for little memory. Where
the vocabulary is sharded, the devices' log-sum-exps meet between forward and backward, and both stay.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch

from kernels.cross_entropy import cross_entropy, cross_entropy_bwd
from kernels.einsum import einsum, parse
from kernels.head_cross_entropy import block_size, head_cross_entropy, head_cross_entropy_bwd
from kernels.head_loss import TOKENS_PER_WIDTH, head_loss
from llama_fn import compat
from llama_fn.compiler import ir


class _Loss(NamedTuple):
    """A loss and its backward: the op's operands, and the nodes that it makes superfluous."""

    operands: tuple[torch.fx.Node, ...]  # g, x, head, targets
    tokens: int  # of a block
    nll: list[torch.fx.Node]
    dx: torch.fx.Node
    dhead: torch.fx.Node
    last: torch.fx.Node  # the backward of the loss


def join_loss(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with each loss and its backward joined where the backward does not wait for a loss."""
    found = {cross_entropy.op: _with_logits, head_cross_entropy.op: _in_blocks}
    for node in ir.calls(gm.graph):
        loss = found[node.target](node) if node.target in found else None
        if loss is not None and _moved_before(loss.operands[0], node):
            _join(gm.graph, node, loss)
    return gm


def _result(node: torch.fx.Node, index: int) -> list[torch.fx.Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def _backward(node: torch.fx.Node, target: Any) -> torch.fx.Node | None:
    """The backward of a loss, if nothing else reads its log-sum-exps."""
    readers = [user for lse in _result(node, 1) for user in lse.users]
    return readers[0] if len(readers) == 1 and readers[0].target is target else None


def _with_logits(node: torch.fx.Node) -> _Loss | None:
    logits, targets = cast(tuple[torch.fx.Node, torch.fx.Node], node.args)
    last = _backward(node, cross_entropy_bwd.op)
    if last is None or logits.target is not einsum.op or set(logits.users) != {node, last}:
        return None
    equation, x, head = cast(tuple[str, torch.fx.Node, torch.fx.Node], logits.args)
    products = {_other(user, last): user for user in last.users if user.target is einsum.op}
    if set(products) != {x, head} or len(last.users) != 2 or not _is_head(equation, products[x], last):
        return None
    tokens = TOKENS_PER_WIDTH * compat.node_value(head).shape[1]
    return _Loss((_cotangent(last), x, head, targets), tokens, _result(node, 0), products[head], products[x], last)


def _other(product: torch.fx.Node, one: torch.fx.Node) -> Any:
    """The operand of a product that is not `one`."""
    return next((x for x in product.args[1:] if x is not one), None)


def _is_head(equation: Any, weight: torch.fx.Node, dlogits: torch.fx.Node) -> bool:
    """Whether logits [..., V] come of [..., D] and a head [V, D], and a gradient of the head lies like it."""
    x, head, logits = parse(equation)
    left, right, out = parse(weight.args[0])  # type: ignore[arg-type]
    of_logits, of_x = (left, right) if weight.args[1] is dlogits else (right, left)
    return head == logits[-1] + x[-1] and logits[:-1] == x[:-1] and out == of_logits[-1] + of_x[-1]


def _in_blocks(node: torch.fx.Node) -> _Loss | None:
    last = _backward(node, head_cross_entropy_bwd.op)
    if last is None:
        return None
    results = [_result(last, i) for i in range(2)]
    if any(len(users) != 1 for users in results):
        return None
    (dx,), (dhead,) = results
    x, head, targets = cast(tuple[torch.fx.Node, ...], node.args)
    tokens = block_size(compat.node_value(targets))
    return _Loss((_cotangent(last), x, head, targets), tokens, _result(node, 0), dx, dhead, last)


def _cotangent(backward: torch.fx.Node) -> torch.fx.Node:
    return cast(torch.fx.Node, backward.args[0])


def _moved_before(value: torch.fx.Node, place: torch.fx.Node) -> bool:
    """Whether `value` does not depend on `place`; it and what it is made of then stand before it."""
    late: set[torch.fx.Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if node is place:
            return False
        if node not in late and place < node:
            late.add(node)
            waiting += node.all_input_nodes
    for node in sorted(late):
        place.prepend(node)
    return True


def _join(graph: torch.fx.Graph, node: torch.fx.Node, loss: _Loss) -> None:
    with graph.inserting_before(node):
        joined = graph.call_function(head_loss.op, (*loss.operands, loss.tokens))
        results = [graph.call_function(operator.getitem, (joined, i)) for i in range(3)]
    values = [compat.node_value(each) for each in (node, loss.dx, loss.dhead)]
    joined.meta["val"] = (values[0][0], *values[1:])
    for i, made in enumerate(results):
        made.meta["val"] = joined.meta["val"][i]
    for made in (joined, *results):
        ir.label(made, loss.dhead)
    for old, made in [*((nll, results[0]) for nll in loss.nll), (loss.dx, results[1]), (loss.dhead, results[2])]:
        old.replace_all_uses_with(made)
    superfluous = {node, *node.users, loss.last, loss.dx, loss.dhead}
    if node.target is cross_entropy.op:
        superfluous.add(cast(torch.fx.Node, node.args[0]))  # the logits
    for old in sorted(superfluous, reverse=True):
        graph.erase_node(old)
