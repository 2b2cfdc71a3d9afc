"""The streams and the order of collectives in GE graphs that the real torchair made."""

from __future__ import annotations

from itertools import pairwise

import pytest
from ge_interpreter import GeRank
from jobs import JOBS, config_of

from llama_fn.compat.ge_streams import COLLECTIVES, LABEL
from llama_fn.inspect import dump
from llama_fn.planner import config_stages
from sharding.collectives import axes_of

GRAPHS = [
    ("tiny_4_ranks", 3, ""), ("tiny_ulysses", 1, ""),
    ("tiny_calls", 0, "part_0"), ("tiny_calls", 1, "microbatch"), ("tiny_calls", 0, "part_1"),
    *(
        pytest.param(*each, "", marks=pytest.mark.slow)
        for each in (
            ("tiny_pipeline_whole", 0), ("tiny_pipeline_whole", 3), ("tiny_pipeline_bf16", 1), ("tiny_one_stream", 0),
            ("65b_8layers", 0),
        )
    ),
]  # fmt: skip
MESSAGES = {"send_next", "send_previous", "receive_next", "receive_previous"}


def collectives(job, rank, graph, lowered):
    """By HCCL's name of the group: its ranks, and the ops in their order."""
    made = GeRank(dump.rank_folder(lowered[job], rank), graph)
    ops = [op for op in made.ops if op.type.startswith("Hcom")]
    assert {op.type for op in ops} <= set(COLLECTIVES)
    named = {op.attr["group"].s.decode() for op in ops}
    return {name: (made.groups[name], [op for op in ops if op.attr["group"].s.decode() == name]) for name in named}


@pytest.mark.parametrize(("job", "rank", "graph"), GRAPHS)
def test_collectives_of_a_group_follow_one_another_on_the_stream_of_their_axes(job, rank, graph, lowered):
    mesh = config_stages.mesh(config_of(JOBS[job]))
    by_group = collectives(job, rank, graph, lowered)
    assert by_group
    for ranks, ops in by_group.values():
        for before, after in pairwise(ops):
            assert f"{before.name}:-1" in after.input, "a control edge"
        labels = {op.attr[LABEL].s.decode() if LABEL in op.attr else "" for op in ops}
        assert len(labels) == 1, "one stream for a group"
        (label,) = labels
        if job == "tiny_one_stream":
            assert label == ""
        elif ops[0].type in ("HcomSend", "HcomReceive"):
            assert label in MESSAGES and label.startswith(ops[0].type[4:].lower())
        else:
            assert list(ranks) in [list(group) for group in mesh.groups(axes_of(label))], "the axes of the group"
