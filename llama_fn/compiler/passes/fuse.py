"""On request: a gather of activations with the product that reads it, a product with the reduce-scatter of its result.

    %g = all_gather(%x, "model", 8, 1)            %y, %g = all_gather_matmul(%x, %w, "model", 8)
    %y = einsum("btd,df->btf", %g, %w)     ->

    %y = einsum("btf,fd->btd", %h, %w)            %z = matmul_reduce_scatter(%h, %w, "model", 8)
    %z = reduce_scatter(%y, "model", 8, 1)

Inside one kernel, parts are multiplied while others travel. Sums run in another order, so the last digits may change.
What was fused, and for every other collective why not, is noted on its node and listed by `as_text`.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import Any, cast

import torch

from kernels.einsum import einsum, stored_layouts
from kernels.registry import Kernel, of_node
from kernels.scope_names import without_numbers
from llama_fn import compat
from llama_fn.compiler import ir
from sharding.abstract_eval import AbstractEval
from sharding.collectives import all_gather, communicates, reduce_scatter
from sharding.fused import UNFUSED, all_gather_matmul, matmul_reduce_scatter

# What AllGatherMatmul and MatmulReduceScatter take on Ascend 910B (CANN manual, aclnnAllGatherMatmul).
DTYPES = (torch.float16, torch.bfloat16)
RANKS = (2, 4, 8)
INNER = range(256, 65535)

aten = torch.ops.aten
NOTE = "note"


def fuse(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with collectives and the products beside them joined where Ascend has one op; `report` says which."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in ir.calls(gm.graph):
        if node.target is all_gather.op:
            why = _fuse_gather(gm.graph, node, order)
        elif node.target is reduce_scatter.op:
            why = _fuse_scatter(gm.graph, node)
        else:
            continue
        if why:
            node.meta["custom"] = {**compat.labels(node), NOTE: f"not fused: {why}"}
    return gm


def report(counted: Iterable[tuple[torch.fx.Node, int]]) -> list[str]:
    """A line per kind of place and note, with how often it stands; layers are one place. `counted`: the ops of a graph,
    each with how often it runs."""
    places: dict[tuple[str, str, str], int] = defaultdict(int)
    for node, times in counted:
        kernel, note = of_node(node.target), compat.labels(node).get(NOTE)
        if note and kernel and (communicates(kernel) or kernel.name in UNFUSED):
            places[without_numbers(ir.scope_of(node)), ir.phase_of(node), str(note)] += times
    return [f"{count} in {scope}, {phase}: {note}" for (scope, phase, note), count in places.items()]


class _Product:
    """An einsum as one matrix product: its operands, sizes, and how they lie in memory."""

    def __init__(self, node: torch.fx.Node) -> None:
        equation, self.left, self.right = cast(tuple[str, torch.fx.Node, torch.fx.Node], node.args)
        values = compat.node_value(self.left), compat.node_value(self.right)
        (_, self.inner, self.left_turned), right, self.straight = stored_layouts(equation, *values)
        rows, columns, self.transposed = right
        self.right_shape = [columns, rows] if self.transposed else [rows, columns]

    def unfit(self, n: int, dim: int, moved: torch.Tensor) -> str:
        """Why a collective of `moved`, whole, over n devices along dim cannot be one op with this product; "" if it
        can."""
        if moved.dtype not in DTYPES:
            return f"{str(moved.dtype).removeprefix('torch.')}, and the fused op takes float16 and bfloat16"
        if n not in RANKS:
            return f"{n} devices, and the fused op takes {', '.join(map(str, RANKS))}"
        if prod(moved.shape[:dim]) != 1:
            return f"dimension {dim} of {tuple(moved.shape)} is not the outermost: one sequence per device would do"
        if self.left_turned or not self.straight:
            return "the left operand or the result lies transposed"
        if self.inner not in INNER:
            return f"inner size {self.inner} is not within {INNER.start}..{INNER.stop - 1}"
        return ""

    def emit(self, new: _Emit, fused: Kernel, left: torch.fx.Node, axes: str, n: int) -> torch.fx.Node:
        """The fused op with the left operand as rows; the note says that it is one."""
        rows = new(aten.view.default, left, [compat.node_value(left).numel() // self.inner, self.inner])
        made = new(fused.op, rows, new(aten.view.default, self.right, self.right_shape), axes, n, self.transposed)
        made.meta["custom"] = {**compat.labels(made), NOTE: f"fused into {fused.name}", ir.MADE_BY: "fuse"}
        return made


def _fuse_gather(graph: torch.fx.Graph, node: torch.fx.Node, order: dict[torch.fx.Node, int]) -> str:
    """Fuse a gather with its first reader, or say why not; later readers get the gathered rows from the fused op."""
    x, axes, n, dim = cast(tuple[torch.fx.Node, str, int, int], node.args)
    first = min(node.users, key=order.__getitem__)
    if first.target is not einsum.op or first.args[1] is not node:
        return "its first reader is not a product with it on the left"
    product = _Product(first)
    why = product.unfit(n, dim, compat.node_value(node))
    if why:
        return why
    new = _Emit(graph, first, node)
    both = product.emit(new, all_gather_matmul, x, axes, n)
    for i, old in enumerate((first, node)):
        shape = list(compat.node_value(old).shape)
        old.replace_all_uses_with(new(aten.view.default, new(operator.getitem, both, i), shape))
    graph.erase_node(first)  # only now: new nodes stand before it
    graph.erase_node(node)
    return ""


def _fuse_scatter(graph: torch.fx.Graph, node: torch.fx.Node) -> str:
    """Fuse a reduce-scatter with the product that it sums, or say why not."""
    y, axes, n, dim = cast(tuple[torch.fx.Node, str, int, int], node.args)
    if y.target is not einsum.op:
        return "what it sums is not a product"
    if len(y.users) > 1:
        return "the product has another reader"
    product = _Product(y)
    why = product.unfit(n, dim, compat.node_value(y))
    if why:
        return why
    new = _Emit(graph, node, node)
    part = product.emit(new, matmul_reduce_scatter, product.left, axes, n)
    node.replace_all_uses_with(new(aten.view.default, part, list(compat.node_value(node).shape)))
    graph.erase_node(node)
    graph.erase_node(y)
    return ""


class _Emit:
    """Makes nodes before `place`, labelled like `like`."""

    def __init__(self, graph: torch.fx.Graph, place: torch.fx.Node, like: torch.fx.Node) -> None:
        self.graph, self.place, self.labels = graph, place, dict(compat.labels(like))
        self.made = AbstractEval.of(compat.node_value(like))

    def __call__(self, target: Any, *args: Any) -> torch.fx.Node:
        with self.graph.inserting_before(self.place):
            node = self.graph.call_function(target, args)
        node.meta["val"] = self.made.result(target, args)
        node.meta["custom"] = self.labels
        return node
