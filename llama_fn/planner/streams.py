"""How long a device takes for ops of its graph, in their order: a stream that computes, and one for each mesh axis.

An op computes once its operands are there and the op before it is done. A collective begins when the program comes to
it and the one before it over the same axes is done; what waits for it stands still until then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llama_fn.compiler import calls, cost, ir
from llama_fn.hardware import Hardware
from llama_fn.planner.links import bandwidth
from llama_fn.planner.survey import seconds
from sharding import Mesh, collectives_table
from sharding.collectives import wait
from sharding.messages import is_message


@dataclass(frozen=True)
class Spent:
    """Seconds of some ops: until the last is done, of computing, and of sending."""

    elapsed_s: float
    compute_s: float
    comms_s: float

    def beyond(self, other: Spent, times: float) -> Spent:
        """This, and `times` what it takes more than `other`."""
        mine, others = (vars(each).values() for each in (self, other))
        return Spent(*(a + times * (a - b) for a, b in zip(mine, others, strict=True)))


def spent(nodes: Iterable[torch.fx.Node], mesh: Mesh, hardware: Hardware) -> Spent:
    """Of the ops among `nodes`; calls, messages and what takes them apart are not counted."""
    done: dict[torch.fx.Node, float] = {}
    links: dict[str, float] = defaultdict(float)
    now = computing = sending = 0.0
    for node in nodes:
        if node.op != "call_function" or calls.is_call(node) or calls.is_packing(node) or is_message(node):
            continue
        ready = max((done.get(operand, 0.0) for operand in ir.operands(node)), default=0.0)
        row = collectives_table.row_of(node)
        if row is not None:
            takes = row.bytes / bandwidth(row.axis, mesh, hardware)
            begin = max(now, ready, links[row.axis])
            done[node] = links[row.axis] = begin + takes
            sending += takes
            now = now if "_start" in str(node.target) else done[node]
        else:
            takes = 0.0 if node.target is wait.op else seconds(cost.flops_of(node), cost.moved(node), hardware)
            now = done[node] = max(now, ready) + takes
            computing += takes
    return Spent(max([now, *links.values()]), computing, sending)
