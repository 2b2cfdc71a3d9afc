"""A microbatch, cut by the parts of the model and by phase: what a stage computes at once is a body.

    forward of part 1             forward of part 2              backward of part 2 ...
      reads   x, from part 1's neighbour, by message
      gives   y for part 2        reads y
              what its own backward will read (kept)

The graph that is cut has two microbatches, of which the second tells what is added up over all of them: the sum of the
first is what its own begins with (`carried`). A graph of one microbatch has no sums.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.barrier import barrier
from llama_fn.compiler import cost, ir
from llama_fn.compiler.passes.regather import gathers_large_layer
from llama_fn.errors import UserError
from sharding.errors import where
from sharding.placement import parts_of
from sharding.schedules import BACKWARD, FORWARD, WEIGHT

Nodes = dict[torch.fx.Node, None]  # in order, and quick to look up in
aten = torch.ops.aten


@dataclass
class Body:
    """What one part computes at once: its ops, what it reads from others, and what others read of it."""

    kind: str
    part: int
    ops: Nodes
    received: Nodes = field(default_factory=dict)  # by message
    again: Nodes = field(default_factory=dict)  # what an earlier body of this part received
    own: Nodes = field(default_factory=dict)  # the microbatch's own, such as its tokens
    shared: Nodes = field(default_factory=dict)  # the same for all microbatches, such as weights
    sent: Nodes = field(default_factory=dict)
    kept: Nodes = field(default_factory=dict)  # for later bodies of this part
    sums: Nodes = field(default_factory=dict)  # added up over microbatches
    earlier: dict[str, Body] = field(default_factory=dict)  # bodies of this part, by kind, whose kept values it reads

    @property
    def results(self) -> list[torch.fx.Node]:
        """What it gives, in order."""
        return [*self.sent, *self.kept, *self.sums]


class Cut:
    """`bodies` by kind and part, and `after`: the ops outside of microbatches that read from these.

    `weights_apart`: weight gradients are a body of their own. `gathers`: every body gathers sharded weights of layers
    anew, so that none stays whole.
    """

    def __init__(self, gm: torch.fx.GraphModule, parts: int, weights_apart: bool, gathers: bool) -> None:
        self.count, self.gathers = parts, gathers
        nodes = list(gm.graph.nodes)
        self.order = {node: i for i, node in enumerate(nodes)}
        numbers = {ir.place_of(node).microbatch for node in ir.calls(gm.graph)} - {None}
        self.number = max((n for n in numbers if n is not None), default=-1)
        self.ops = {n: i for i, n in enumerate(nodes) if self._number(n) == self.number}
        self.first = {n for n in nodes if self._number(n) not in (None, self.number)}
        self.after = self._after(nodes)
        self.carried = self._carried()
        self.bodies: dict[tuple[str, int], Body] = {}
        for part in range(parts):
            self._add_bodies(part, weights_apart)
        for body in self.bodies.values():
            self._connect(body)

    @staticmethod
    def _number(node: torch.fx.Node) -> int | None:
        return ir.place_of(node).microbatch if node.op == "call_function" else None

    def _after(self, nodes: Iterable[torch.fx.Node]) -> Nodes:
        """What waits for microbatches, and is in none."""
        after: Nodes = {}
        for node in nodes:
            outside = node.op == "output" or (node.op == "call_function" and self._number(node) is None)
            if outside and any(used in after or used in self.ops for used in ir.operands(node)):
                after[node] = None
        return after

    def _carried(self) -> dict[torch.fx.Node, torch.fx.Node]:
        """By sum over microbatches what the first gives it; UserError for what is read afterwards and no sum."""
        carried: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in dict.fromkeys(used for each in self.after for used in ir.operands(each) if used in self.ops):
            before = [used for used in ir.operands(node) if used in self.first]
            if self.first and (len(before) != 1 or node.target is not aten.add.Tensor):
                raise UserError(
                    f"{where(node)} is read after the microbatches and is no sum over them, which is what a pipeline "
                    "can hand on. Add it up with transforms.accumulate or fold"
                )
            carried[node] = before[0] if before else node
        strays = [n for n in self.ops if n not in carried and any(used in self.first for used in ir.operands(n))]
        if strays:
            raise UserError(
                f"{where(strays[0])} reads a value of the microbatch before, which a pipeline works on at another time"
            )
        return carried

    def _add_bodies(self, part: int, weights_apart: bool) -> None:
        """The bodies of one part: forward, backward and, if they are work of their own, weight gradients."""
        mine = {node for node in self.ops if part in parts_of(node)}
        back = self._closed({n for n in mine if ir.phase_of(n) != "forward"}, part, "backward")
        read = {used for node in back for used in self.operands(node, part)}
        forward = {n for n in mine if ir.phase_of(n) == "forward"}
        forward |= {n for n in read if n in self.ops and not parts_of(n) and ir.phase_of(n) == "forward"}
        self._add(FORWARD, part, self._closed(forward, part, "forward"))
        rest = back - self._of_inputs(back, part) if weights_apart else set()
        self._add(BACKWARD, part, back - rest)
        if weights_apart:
            self._add(WEIGHT, part, rest)

    def _add(self, kind: str, part: int, ops: set[torch.fx.Node]) -> None:
        self.bodies[kind, part] = Body(kind, part, {node: None for node in self.ops if node in ops})

    def _closed(self, nodes: set[torch.fx.Node], part: int, phase: str) -> set[torch.fx.Node]:
        """With the ops of that phase which they read and which stand on no part: each body has those of its own."""
        nodes, todo = set(nodes), list(nodes)
        while todo:
            for used in self.operands(todo.pop(), part):
                anywhere = (
                    used in self.ops and not parts_of(used) and (ir.phase_of(used) == "forward") == (phase == "forward")
                )
                if anywhere and used not in nodes:
                    nodes.add(used)
                    todo.append(used)
        return nodes

    def _of_inputs(self, back: set[torch.fx.Node], part: int) -> set[torch.fx.Node]:
        """Of a backward what the gradients of the part's inputs need: all that its neighbour waits for."""
        if part:
            ends = {n for n in back if any(part - 1 in parts_of(user) for user in n.users if user in self.ops)}
        else:  # nobody waits: the gradient that reaches the first op which is no layer's
            outside = [n for n in back if not ir.place_of(n).is_layer and part in parts_of(n)]
            ends = {used for n in outside for used in ir.operands(n) if used in back and ir.place_of(used).is_layer}
        todo, needed = list(ends), set(ends)
        while todo:
            for used in self.operands(todo.pop(), part):
                if used in back and used not in needed:
                    needed.add(used)
                    todo.append(used)
        # What an op gives besides is taken apart where the op is: bodies hand on tensors.
        return needed | {user for n in needed for user in n.users if user.target is operator.getitem and user in back}

    def operands(self, node: torch.fx.Node, part: int) -> Iterator[torch.fx.Node]:
        """What an op reads on a part: of a sum over several parts, the terms of this one."""
        yield from (self.on(used, part) for used in ir.operands(node))

    def on(self, node: torch.fx.Node, part: int) -> torch.fx.Node:
        """What stands for a value on a part: of a sum of two parts' terms the one that it has, if it has only one."""
        while node in self.ops and len(parts_of(node)) > 1 and node.target is aten.add.Tensor:
            terms = [used for used in ir.operands(node) if not parts_of(used) or part in parts_of(used)]
            if len(terms) != 1:
                break
            node = terms[0]
        return node

    def _connect(self, body: Body) -> None:
        """Sort what a body reads, and have those that compute it give it."""
        part = body.part
        body.ops = {node: None for node in body.ops if self.on(node, part) is node}
        body.ops = {**self._anew(body), **body.ops}
        body.sums |= {node: None for node in self.carried if self.on(node, part) in body.ops}
        for used in dict.fromkeys(used for node in body.ops for used in self.operands(node, part)):
            if used in body.ops or used in self.first:
                continue
            if used in self.ops:
                self._hand_over(used, body)
            elif parts_of(used) and part not in parts_of(used):
                raise _apart(used, body)
            elif self._is_own(used):
                body.own[used] = None
            else:
                body.shared[used] = None

    def _anew(self, body: Body) -> Nodes:
        """What a body makes for itself of what other bodies read too: whole weights, which are not to be kept from its
        forward to its backward, and views of what stands outside of the microbatches."""
        anew: list[torch.fx.Node] = []
        todo = list(body.ops)
        while todo:
            for used in self.operands(todo.pop(), body.part):
                gathers = gathers_large_layer(used) and (self.gathers or used in self.ops)
                if used not in body.ops and used not in anew and (gathers or self._is_view_of_outside(used)):
                    anew.append(used)
                    todo.append(used)
        return dict.fromkeys(sorted(anew, key=self.order.__getitem__))

    def _is_view_of_outside(self, node: torch.fx.Node) -> bool:
        """Whether a value of the microbatch lives in one that is none's."""
        if node not in self.ops or not cost.is_view(node) or node.target is barrier.op:
            return False
        source = ir.operands(node)[0]
        return (source not in self.ops and source not in self.first) or self._is_view_of_outside(source)

    def _hand_over(self, used: torch.fx.Node, body: Body) -> None:
        """A body reads what another computes: an earlier one of its part, or one of a neighbour."""
        mine = [b for b in self._of_part(body.part) if used in b.ops]
        if mine:
            mine[0].kept[used] = None
            body.earlier[mine[0].kind] = mine[0]
            return
        earlier = [b for b in self._of_part(body.part) if used in b.received and b is not body]
        if earlier:
            body.again[used] = None
            return
        source, phase = min(parts_of(used)), ir.phase_of(used)
        step = 1 if phase == "forward" else -1
        if source + step != body.part or (body.kind == FORWARD) != (phase == "forward"):
            raise _apart(used, body)
        body.received[used] = None
        for other in self._of_part(source):
            if used in other.ops:
                other.sent[used] = None

    def _of_part(self, part: int) -> list[Body]:
        return [b for kind in (FORWARD, BACKWARD, WEIGHT) if (b := self.bodies.get((kind, part))) is not None]

    def _is_own(self, node: torch.fx.Node) -> bool:
        """Whether a value belongs to the microbatch: the part, by its number, of something with a part for each."""
        source: Any = node.args[0] if node.target is operator.getitem else None
        if source is None or parts_of(node) or source.target is not aten.unbind.int or not self.first:
            return False
        of_first = [reader for user in source.users if user.args[1] == 0 for reader in user.users]
        return bool(node.args[1] == self.number) and any(reader in self.first for reader in of_first)


def _apart(used: torch.fx.Node, body: Body) -> UserError:
    return UserError(
        f"{where(used)} is on part {min(parts_of(used))} of the pipelined model and read by the {body.kind} of part "
        f"{body.part}. Values go from a part to the next, and their gradients back; have the layers between hand it on"
    )
