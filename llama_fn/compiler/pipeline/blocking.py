"""Proof, without a device, that the stages of a pipeline end where each is one graph on streams of a device.

There a message stops its stream until both sides have come to it, and with it all that stands behind it on this stream.
check.py, whose messages stop nobody, does not see that: on one stream for all collectives the message for the next
microbatch, asked for early, holds up the reductions of this one, for which the other stage may be waiting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from llama_fn.compiler import calls, ir
from llama_fn.compiler.pipeline.check import message_key, told
from llama_fn.errors import UserError
from sharding import collectives_table
from sharding.messages import is_message, over_stages, received, stream_of

Node = torch.fx.Node
COMPUTING, ONE = "", "one"  # streams; the others are named by mesh axes, and by directions


@dataclass
class _Stage:
    """The ops of one stage, by stream and as far as they are done."""

    streams_of: dict[Node, list[str]]
    queues: dict[str, list[Node]] = field(default_factory=lambda: defaultdict(list))
    at: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    done: set[Node] = field(default_factory=set)

    def heads(self) -> Iterator[Node]:
        """What stands first on all of its streams, and has all that it reads."""
        for stream, queue in self.queues.items():
            node = queue[self.at[stream]] if self.at[stream] < len(queue) else None
            if node is not None and self.streams_of[node][0] == stream and self._ready(node):
                yield node

    def _ready(self, node: Node) -> bool:
        first = all(self.queues[s][self.at[s]] is node for s in self.streams_of[node])
        return first and all(x in self.done or x.op != "call_function" for x in node.all_input_nodes)

    def finish(self, node: Node) -> None:
        """It has run."""
        self.done.add(node)
        for stream in self.streams_of[node]:
            self.at[stream] += 1


def check_streams(programs: Sequence[torch.fx.GraphModule], by_axis: bool) -> None:
    """UserError naming what each stage waits for, where the stages' programs never end. `by_axis`: collectives of each
    mesh axis and messages of each direction have a stream of their own; else one stream has them all."""
    stages = [_stage(gm, by_axis) for gm in programs]
    moved = True
    while moved:
        moved = False
        waiting: dict[object, list[tuple[_Stage, Node]]] = defaultdict(list)
        for number, stage in enumerate(stages):
            while alone := [node for node in stage.heads() if not _meets(node)]:
                for node in alone:
                    stage.finish(node)
                moved = True
            for node in stage.heads():
                key = message_key(node, number) if is_message(node) else stage.streams_of[node][0]
                waiting[key].append((stage, node))
        for met in waiting.values():
            if len(met) == (2 if is_message(met[0][1]) else len(stages)):
                for stage, node in met:
                    stage.finish(node)
                moved = True
    stuck = [
        f"stage {number} at {told(queue[stage.at[stream]])[:-1]}"
        for number, stage in enumerate(stages)
        for stream, queue in stage.queues.items()
        if stage.at[stream] < len(queue)
    ]
    if stuck:
        advice = "" if by_axis else ". Give each axis and direction its own: --run.npu_streams=by_axis"
        raise UserError(f"on their streams the stages would wait for ever: {'; '.join(stuck[:6])}{advice}")


def _meets(node: Node) -> bool:
    return over_stages(node) or (is_message(node) and node.target is not received.op)


def _stage(gm: torch.fx.GraphModule, by_axis: bool) -> _Stage:
    nodes = ir.calls(gm.graph)
    stage = _Stage({node: _streams(gm, node, by_axis) for node in nodes})
    for node, streams in stage.streams_of.items():
        for stream in streams:
            stage.queues[stream].append(node)
    return stage


def _streams(gm: torch.fx.GraphModule, node: Node, by_axis: bool) -> list[str]:
    """Of an op; a call stands on the streams of all that its body has."""
    if is_message(node) and node.target is not received.op:
        return [stream_of(node) if by_axis else ONE]
    if calls.is_call(node):
        inside = {s for op, _ in calls.counted(calls.body_of(gm, node)) for s in _axes(op, by_axis)}
        return [COMPUTING, *sorted(inside)]
    return _axes(node, by_axis) or [COMPUTING]


def _axes(node: Node, by_axis: bool) -> list[str]:
    row = collectives_table.row_of(node) if node.op == "call_function" else None
    return [] if row is None else [row.axis if by_axis else ONE]
