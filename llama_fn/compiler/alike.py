"""Two microbatches that come one after the other, and do the same: what passes/roll.py makes calls of one body of."""

from __future__ import annotations

import operator
from typing import Any

import torch

from llama_fn.compiler import ir
from llama_fn.compiler.shorten import Missing

Pair = tuple[torch.fx.Node, torch.fx.Node]  # what one microbatch reads, and what the next reads in its place


class NotAlike(Exception):
    """Two microbatches between the first and the last came out different."""


class Alike:
    """Two microbatches, one after the other, that do the same, and what their ops read of others; NotAlike if not."""

    def __init__(self, one: list[torch.fx.Node], two: list[torch.fx.Node], missing: Missing) -> None:
        self.one, self.two, self.missing = one, two, missing
        self.in_one = {node: i for i, node in enumerate(one)}
        self.in_two = {node: i for i, node in enumerate(two)}
        self.carried: dict[Pair, None] = {}  # from a microbatch to the next
        self.shared: dict[Pair, None] = {}  # the same value in each
        self.indexed: dict[Pair, None] = {}  # each has its own: tokens
        self.roles: list[Any] = []  # of what is read, one after the other: the same for microbatches that are alike
        if len(one) != len(two):
            raise NotAlike(f"one has {len(one)} ops, the next {len(two)}")
        for x, y in zip(one, two, strict=True):
            self._compare(x, y)

    def _compare(self, x: torch.fx.Node, y: torch.fx.Node) -> None:
        """Sort what the ops at one position of both read; NotAlike where they do not do the same."""
        if x.op != y.op or x.target != y.target or _frame(x) != _frame(y) or ir.phase_of(x) != ir.phase_of(y):
            raise NotAlike(f"{x.format_node()} in one is {y.format_node()} in the next")
        for a, b in zip(operands(x), operands(y), strict=True):
            if a in self.in_one:
                if self.in_one[a] != self.in_two.get(b):
                    raise NotAlike(f"{x} reads {a} of its microbatch, {y} of the next reads {b}")
                continue
            if b in self.in_one:
                self.carried[a, b] = None
                self.roles.append(self.in_one[b])
            elif a is b:
                self.shared[a, b] = None
                self.roles.append(a)
            elif self._own(a, b):
                self.indexed[a, b] = None
                self.roles.append(a.args[0])
            else:
                raise NotAlike(f"{x} reads {a}, {y} of the next microbatch reads {b}")

    def _own(self, a: torch.fx.Node, b: torch.fx.Node) -> bool:
        """Whether they are the parts of one value that belong to two microbatches, one after the other."""
        parts = a.target is operator.getitem is b.target and a.args[0] is b.args[0]
        return parts and self.number(a) + 1 == self.number(b)

    def number(self, part: torch.fx.Node) -> int:
        """Of the microbatch that a part belongs to, among those of this graph."""
        number: Any = part.args[1]
        return number - self.missing.calls if number >= self.missing.first + 2 else number


def operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes in a node's arguments, each as often as it stands there."""
    read: list[torch.fx.Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), read.append)
    return read


def _frame(node: torch.fx.Node) -> str:
    """A node's arguments but for which nodes they name."""
    return str(torch.fx.node.map_arg((node.args, node.kwargs), lambda _: "%"))
