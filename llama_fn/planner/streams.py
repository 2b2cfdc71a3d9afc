"""How long a device takes for ops of its graph, in their order: a stream that computes, and streams that send.

An op computes once its operands are there and the op before it is done. A collective begins when the program comes to
it and the one before it on its stream is done; what waits for it stands still until then. Collectives of different mesh
axes have streams of their own, as in the GE graph (compat/ge_streams.py); what they would take on one stream is
counted too (--run.npu_streams=one).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llama_fn.compiler import calls, cost, ir, stages
from llama_fn.hardware import Hardware
from llama_fn.planner.links import bandwidth
from llama_fn.planner.survey import MICROBATCHES, seconds
from sharding import Mesh, collectives_table
from sharding.messages import is_message


@dataclass(frozen=True)
class Spent:
    """Seconds of some ops: until the last is done, the same with one stream for all collectives, of computing, and of
    sending."""

    elapsed_s: float
    one_stream_s: float
    compute_s: float
    comms_s: float

    @property
    def waiting_s(self) -> float:
        """Of these, how long nothing computes."""
        return max(0.0, self.elapsed_s - self.compute_s)

    @property
    def waiting_on_one_stream_s(self) -> float:
        """The same with one stream for all collectives."""
        return max(0.0, self.one_stream_s - self.compute_s)

    def beyond(self, other: Spent, times: float) -> Spent:
        """This, and `times` what it takes more than `other`."""
        mine, others = (vars(each).values() for each in (self, other))
        return Spent(*(a + times * (a - b) for a, b in zip(mine, others, strict=True)))


NOTHING = Spent(0.0, 0.0, 0.0, 0.0)


def spent(nodes: Iterable[torch.fx.Node], mesh: Mesh, hardware: Hardware) -> Spent:
    """Of the ops among `nodes`; calls, messages and what takes them apart are not counted."""
    return _spent(_priced(nodes, mesh, hardware))


def of_step(lowered: stages.Lowered, hardware: Hardware, microbatches: int) -> Spent:
    """Of a whole step, which has `microbatches`; from MICROBATCHES on, `lowered` has as many, of which the second
    stands for all between the first and the last."""
    nodes = [node for node, _ in calls.counted(lowered.graph_module)]
    ops = _priced(nodes, lowered.mesh, hardware)
    whole, more = _spent(ops), microbatches - MICROBATCHES
    if more <= 0:
        return whole
    begins = {ir.place_of(op.node).microbatch: i for i, op in reversed(list(enumerate(ops)))}
    before, behind = (_spent(ops[: begins[number]], drained=False) for number in (1, 2))
    each = zip(*(vars(part).values() for part in (whole, before, behind)), strict=True)
    return Spent(*(a + more * (c - b) for a, b, c in each))


@dataclass(frozen=True)
class _Op:
    """An op, what it reads, and the seconds that it takes; the axes that it sends over, and whether the program waits
    for it there."""

    node: torch.fx.Node
    reads: list[torch.fx.Node]
    seconds: float
    axes: str = ""
    waits: bool = True


def _priced(nodes: Iterable[torch.fx.Node], mesh: Mesh, hardware: Hardware) -> list[_Op]:
    ops = []
    for node in nodes:
        if node.op != "call_function" or calls.is_call(node) or calls.is_packing(node) or is_message(node):
            continue
        row, reads = collectives_table.row_of(node), ir.operands(node)
        if row is not None:
            takes = row.bytes / bandwidth(row.axis, mesh, hardware)
            ops.append(_Op(node, reads, takes, row.axis, "_start" not in str(node.target)))
        else:
            ops.append(_Op(node, reads, seconds(cost.flops_of(node), cost.moved(node), hardware)))
    return ops


def _spent(ops: Sequence[_Op], drained: bool = True) -> Spent:
    """`drained`: until all that was begun has been sent, too."""
    computing = sum(op.seconds for op in ops if not op.axes)
    sending = sum(op.seconds for op in ops if op.axes)
    return Spent(_elapsed(ops, True, drained), _elapsed(ops, False, drained), computing, sending)


def _elapsed(ops: Sequence[_Op], by_axis: bool, drained: bool) -> float:
    """By the clock, until the last op is done."""
    done: dict[torch.fx.Node, float] = {}
    streams: dict[str, float] = defaultdict(float)
    now = 0.0
    for op in ops:
        ready = max((done.get(operand, 0.0) for operand in op.reads), default=0.0)
        if not op.axes:
            now = done[op.node] = max(now, ready) + op.seconds
            continue
        stream = op.axes if by_axis else ""
        done[op.node] = streams[stream] = max(now, ready, streams[stream]) + op.seconds
        now = done[op.node] if op.waits else now
    return max([now, *streams.values()]) if drained else now
