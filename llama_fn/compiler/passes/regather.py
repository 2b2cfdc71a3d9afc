"""Gather weights anew for the backward, so that no whole weight stays in memory from the forward (ZeRO-3).

    gather layers/0 ... forward ... backward of layers/0 reads it
->
    gather layers/0 ... forward ... gather layers/0 again, while layers/1 is in its backward ... backward of layers/0

Every part of the step that comes back to a layer gets a gather of its own: its backward, and with several microbatches
the forward of each after the first. The last layer's backward follows its forward at once and shares. On request
(Remat.gathers); weights of at most bucket.SMALL bytes stay.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.barrier import barrier
from kernels.registry import tensor_bytes
from kernels.scope_names import GATHER
from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.compiler.passes.bucket import SMALL
from llama_fn.compiler.passes.remat import RECOMPUTED
from sharding.collectives import all_gather


def regather(gm: torch.fx.GraphModule, ctx: Any) -> torch.fx.GraphModule:
    """`gm` with sharded weights gathered again for the backward, where ctx.remat asks for it."""
    if not ctx.remat.gathers:
        return gm
    segments = _Segments(gm.graph)
    for node in ir.calls(gm.graph):
        if gathers_large_layer(node):
            _split(gm.graph, node, segments)
    return gm


def gathers_large_layer(node: torch.fx.Node) -> bool:
    """Whether a node gathers a weight of a layer that is worth gathering again."""
    gathers = node.target is all_gather.op and _gathers_layer(node)
    return gathers and tensor_bytes(compat.node_value(node)) > SMALL


def _gathers_layer(node: torch.fx.Node) -> bool:
    scope = ir.place_of(node)
    return scope.role == GATHER and scope.layer is not None


class _Segments:
    """The stretches of the graph, each one layer in one phase, in order."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.firsts: list[torch.fx.Node] = []
        self.number: dict[tuple[str, str], int] = {}
        for node in ir.calls(graph):
            key = self._key(node)
            if key is not None and key not in self.number:
                self.number[key] = len(self.firsts)
                self.firsts.append(node)

    @staticmethod
    def _key(node: torch.fx.Node) -> tuple[str, str] | None:
        scope = ir.place_of(node)
        return (scope.place, ir.phase_of(node)) if scope.is_layer else None

    def of(self, node: torch.fx.Node) -> int:
        key = self._key(node)
        return -1 if key is None else self.number[key]

    def entering(self, segment: int) -> torch.fx.Node:
        """What a stretch begins with: the activations, or their gradient, that reach its first op."""
        operands = ir.operands(self.firsts[segment])
        moving = [x for x in operands if ir.place_of(x).microbatch is not None and not _gathers_layer(x)]
        return max(moving or operands, key=self.order.__getitem__)


def _split(graph: torch.fx.Graph, gather: torch.fx.Node, segments: _Segments) -> None:
    """Give every segment but the first its own copy of the gather, to be started one segment before."""
    readers: dict[int, list[torch.fx.Node]] = {}
    for user in gather.users:
        readers.setdefault(segments.of(user), []).append(user)
    if -1 in readers:
        return
    source, before = gather, min(readers)
    for segment in sorted(readers):
        if segment > before + 1:
            first = min(readers[segment], key=segments.order.__getitem__)
            source = _again(graph, gather, first, segments.entering(segment - 1))
        for reader in readers[segment]:
            reader.replace_input_with(gather, source)
        before = segment


def _again(
    graph: torch.fx.Graph, gather: torch.fx.Node, reader: torch.fx.Node, entering: torch.fx.Node
) -> torch.fx.Node:
    shard: Any = gather.args[0]
    scope = ir.place_of(gather).in_microbatch(ir.place_of(reader).microbatch)
    where = {
        **compat.labels(gather), "scope": scope, "phase": ir.phase_of(reader), "note": RECOMPUTED,
        ir.MADE_BY: "regather",
    }  # fmt: skip
    with graph.inserting_before(reader):
        held = graph.call_function(barrier.op, (shard, entering))
        new = graph.call_function(all_gather.op, (held, *gather.args[1:]))
    for node, like in ((held, shard), (new, gather)):
        node.meta = {"val": compat.node_value(like), "custom": where}
    return new
