"""On which stream of the device the collectives of a GE graph stand, and in which order.

GE puts all collectives without a label on one stream, where a gather between machines waits behind a reduction inside
of one, and a message that nobody has sent yet stops everything behind it. `torchair.scope.npu_stream_switch` gives ops
a stream of their own by the attributes that are set here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

COLLECTIVES = ("HcomAllGather", "HcomAllReduce", "HcomReduceScatter", "HcomAllToAll", "HcomSend", "HcomReceive")
LABEL, PRIORITY, INNER_PARALLEL = "_user_stream_label", "_user_stream_priority", "_enable_inner_parallel"


def arrange(graph: Any, streams: Mapping[str, str]) -> None:
    """Put each collective of torchair's `graph` behind the one before it in its group, and on the stream that `streams`
    names for the group (by its name in torch.distributed), if it names any.

    HCCL pairs the collectives of a group in the order in which ranks come to them. Torchair's documentation of
    topological sorting asks for control edges, as GE's passes may undo any sorting.
    """
    labels = {hccl: streams.get(group, "") for hccl, group in _groups(graph, streams).items()}
    last: dict[str, str] = {}
    for op in graph.op:
        if op.type not in COLLECTIVES:
            continue
        group = op.attr["group"].s.decode()
        edge = f"{last.get(group)}:-1"
        if group in last and edge not in op.input:
            op.input.append(edge)
        last[group] = op.name
        if labels.get(group):
            op.attr[LABEL].s = labels[group].encode()
            op.attr[PRIORITY].s = b"0"
            op.attr[INNER_PARALLEL].b = False  # one stream for a label, so that the order stays


def _groups(graph: Any, names: Mapping[str, str]) -> dict[str, str]:
    """HCCL's names of the graph's groups, and torch.distributed's."""
    distributed = torch.distributed.distributed_c10d
    known = {}
    for name in names:
        group = distributed._resolve_process_group(name)  # type: ignore[arg-type]
        ranks = tuple(torch.distributed.get_process_group_ranks(group))
        known[ranks, distributed._get_group_tag(group)] = name
    used = {hccl: (tuple(ranks), tag) for hccl, (ranks, tag) in graph.used_process_group.items()}
    return {hccl: known[key] for hccl, key in used.items() if key in known}
