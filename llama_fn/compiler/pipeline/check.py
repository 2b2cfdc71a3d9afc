"""Proof, without a device, that the programs of a pipeline's stages go together.

Every message that is sent is asked for, with the same shape and dtype and in the order in which it is sent; all stages
come to the same collectives in the same order; and none waits for what another will only do afterwards. Collectives
inside of a stage need no proof: all of its devices run one program.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.errors import UserError
from llama_fn.model.arrays import describe
from sharding.errors import where
from sharding.messages import is_message, over_stages, receive, send, way

Node = torch.fx.Node
Key = tuple[int, int, int]  # of a message: the stage that sends, the one that receives, the tag


def check(programs: Sequence[torch.fx.GraphModule]) -> None:
    """UserError naming the ops of both stages where the programs of all stages do not go together."""
    together = [[node for node in ir.calls(gm.graph) if is_message(node) or over_stages(node)] for gm in programs]
    _check_messages(together)
    _check_order(together)


def message_key(node: Node, stage: int) -> Key:
    """Which message a node sends, asks for or takes, on this stage."""
    n, step, tag = way(node)
    other = (stage + step) % n
    return (stage, other, tag) if node.target is send.op else (other, stage, tag)


def _check_messages(programs: list[list[Node]]) -> None:
    """Sends and receives, pair by pair and in order."""
    sent: dict[tuple[int, int], dict[Key, Node]] = defaultdict(dict)
    asked: dict[tuple[int, int], dict[Key, Node]] = defaultdict(dict)
    for stage, nodes in enumerate(programs):
        for node in nodes:
            side = {send.op: sent, receive.op: asked}.get(node.target)
            if side is None:
                continue
            key = message_key(node, stage)
            if key in side[key[:2]]:
                raise UserError(f"stage {stage}: {told(node)} and {told(side[key[:2]][key])} have one tag, {key[2]}")
            side[key[:2]][key] = node
    for pair in sorted({*sent, *asked}):
        one, other = sent[pair], asked[pair]
        for key in [*one, *other]:
            if key not in one or key not in other:
                node, lacks = (
                    (one[key], f"stage {pair[1]} asks") if key in one else (other[key], f"stage {pair[0]} sends")
                )
                raise UserError(f"{_way(pair)}: {told(node)} has tag {key[2]}, and {lacks} nothing with that tag")
            _check_alike(one[key], other[key], key)
        for a, b in zip(one, other, strict=True):
            if a != b:
                raise UserError(f"{_way(pair)}: {told(one[a])} sends what comes after {told(other[b])} has asked")


def _check_alike(sent: Node, asked: Node, key: Key) -> None:
    value = compat.node_value(sent.args[0])  # type: ignore[arg-type]
    if describe(value) != describe(compat.node_value(asked)):
        raise UserError(
            f"{_way(key)}, tag {key[2]}: {told(sent)} sends {describe(value)}, and {told(asked)} "
            f"asks for {describe(compat.node_value(asked))}"
        )


def _check_order(programs: list[list[Node]]) -> None:
    """Run the programs with nothing in them: each to where it waits, until all are at their ends."""
    at = [0] * len(programs)
    there: set[Key] = set()
    moved = True
    while moved:
        moved = False
        for stage, nodes in enumerate(programs):
            while at[stage] < len(nodes) and not over_stages(nodes[at[stage]]):
                node = nodes[at[stage]]
                key = message_key(node, stage)
                if node.target is send.op:
                    there.add(key)
                elif node.target is not receive.op and key not in there:
                    break
                at[stage], moved = at[stage] + 1, True
        now = [nodes[i] if i < len(nodes) else None for nodes, i in zip(programs, at, strict=True)]
        met = [node for node in now if node is not None and over_stages(node)]
        if len(met) == len(programs):
            _check_same(met)
            at, moved = [i + 1 for i in at], True
    stuck = [(stage, node) for stage, node in enumerate(now) if node is not None]
    if stuck:
        waiting = "; ".join(f"stage {stage} at {told(node)[:-1]}" for stage, node in stuck)
        raise UserError(f"the stages of this pipeline would wait for ever: {waiting}")


def _check_same(met: list[Node]) -> None:
    """All stages in one collective."""
    first, *others = met
    for stage, node in enumerate(others, 1):
        if _collective(node) != _collective(first):
            raise UserError(
                f"stage 0 comes to {told(first)} when stage {stage} comes to {told(node)}: {_collective(first)} is "
                f"not {_collective(node)}"
            )


def _collective(node: Node) -> str:
    """What all must agree about."""
    given = [describe(compat.node_value(x)) if isinstance(x, Node) else str(x) for x in node.args]
    return f"{ir.target_text(node)}({', '.join(given)})"


def _way(pair: tuple[int, ...]) -> str:
    return f"from stage {pair[0]} to {pair[1]}"


def told(node: Node) -> str:
    """An op and where it stands, for an error."""
    return f"%{node.name}, {where(node)},"
