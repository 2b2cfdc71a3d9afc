"""Stages that are one graph each on streams of a device: which ways of laying out streams let them end."""

from __future__ import annotations

import pytest
from pipelines import traced

from llama_fn.compiler import ir
from llama_fn.compiler.pipeline.blocking import check_streams
from llama_fn.errors import UserError
from sharding import Mesh
from sharding.messages import receive, send
from sharding.stages import Pipeline

ORDERS = [Pipeline("gpipe"), Pipeline("1f1b"), Pipeline("interleaved", 2), Pipeline("zb_h1")]


def lowered(mesh, pipeline, microbatches=4):
    _, step = traced(8, microbatches, "fp32", 2, False, False)
    return step.lower(Mesh.parse(mesh), pipeline=pipeline)


@pytest.mark.parametrize("pipeline", ORDERS, ids=lambda p: p.schedule)
@pytest.mark.parametrize("mesh", ["pipe:2,model:2", "pipe:4,data:2"])
def test_every_schedule_ends_with_a_stream_for_each_axis_and_direction(mesh, pipeline):
    check_streams(lowered(mesh, pipeline).graphs, by_axis=True)


def test_on_one_stream_messages_hold_up_what_others_wait_for():
    graphs = lowered("pipe:2,model:2", Pipeline("1f1b")).graphs
    with pytest.raises(UserError, match=r"would wait for ever: stage 0 at .*--run\.npu_streams=by_axis"):
        check_streams(graphs, by_axis=False)


def test_a_message_asked_for_before_what_it_waits_for_is_sent_is_found_on_one_stream_only():
    """Two stages that each ask first and send then: fine where the directions have streams, a deadlock on one."""
    graphs = lowered("pipe:2", Pipeline("gpipe"), 1).graphs
    check_streams(graphs, by_axis=True)
    for gm in graphs:
        nodes = ir.calls(gm.graph)
        asked = [node for node in nodes if node.target is receive.op]
        for node in asked:
            next(n for n in nodes if n.op == "call_function").prepend(node)
        gm.graph.lint()
    with pytest.raises(UserError, match="would wait for ever"):
        check_streams(graphs, by_axis=False)
    check_streams(graphs, by_axis=True)


def test_a_message_that_nobody_sends_is_found():
    graphs = lowered("pipe:2", Pipeline("1f1b")).graphs
    dropped = next(node for node in graphs[0].graph.nodes if node.target is send.op)
    dropped.replace_all_uses_with(dropped.args[0])
    graphs[0].graph.erase_node(dropped)
    with pytest.raises(UserError, match=r"stage 1 at %receive"):
        check_streams(graphs, by_axis=True)
