"""The budget's counts against the GE graphs that the real torchair makes."""

from __future__ import annotations

from collections import Counter

import pytest
from ge_interpreter import GeRank
from jobs import JOBS, config_of

from llama_fn.ascend.budget import CONST_BYTES_PER_OP
from llama_fn.compat.ge_streams import LABEL
from llama_fn.compiler.backends.ge_counts import NO_WORK, counted
from llama_fn.inspect import dump
from llama_fn.planner import config_stages

WHOLE = [
    ("tiny_4_ranks", 2), ("tiny_fused", 0),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("tiny_bf16_data2_model4", 0), ("tiny_ulysses", 1), ("tiny_fp32", 0), ("tiny_fp16_gqa", 0),
            ("tiny_remat", 1), ("65b_fused", 0), ("tiny_variants", 1),
            ("tiny_segments", 0), ("tiny_bf16", 0), ("65b_8layers", 0),
        )
    ),
]  # fmt: skip


def lowered_of(job, rank):
    cfg = config_of(JOBS[job])
    return config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg)).of_rank(rank)


def of_torchair(folder, rank, graph):
    made = GeRank(dump.rank_folder(folder, rank), graph)
    streams = Counter(op.attr[LABEL].s.decode() for op in made.ops if op.type.startswith("Hcom"))
    return Counter(op.type for op in made.ops if op.type not in NO_WORK), streams


@pytest.mark.parametrize(("job", "rank"), WHOLE)
def test_ops_and_collectives_are_those_of_the_graph_that_torchair_makes(job, rank, lowered):
    (mine,) = counted(lowered_of(job, rank).graph_module).in_form("whole").graphs
    ops, streams = of_torchair(lowered[job], rank, "")
    assert mine.ops == ops
    assert mine.collectives == streams


@pytest.mark.parametrize(
    "job", ["tiny_4_ranks", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tiny_bf16", "65b_8layers"))]
)
def test_the_model_file_has_about_the_size_that_is_told(job, lowered):
    (mine,) = counted(lowered_of(job, 0).graph_module).in_form("whole").graphs
    size = (dump.rank_folder(lowered[job], 0) / dump.GE_AIR).stat().st_size
    assert mine.air_bytes == pytest.approx(size, rel=0.2)


@pytest.mark.parametrize(
    "job", ["tiny_4_ranks", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tiny_bf16", "65b_8layers"))]
)
def test_shapes_and_numbers_take_no_more_than_the_bound(job, lowered):
    (mine,) = counted(lowered_of(job, 0).graph_module).in_form("whole").graphs
    ops = GeRank(dump.rank_folder(lowered[job], 0), "").ops
    taken = sum(len(op.attr["value"].t.data) for op in ops if op.type == "Const")
    assert taken <= mine.total * CONST_BYTES_PER_OP <= 4 * taken


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_of_a_pipeline_written_out_ops_are_a_bound_and_collectives_exact(rank, lowered):
    made = counted(lowered_of("tiny_pipeline_whole", rank).graph_module).in_form("whole")
    (mine,) = made.graphs
    ops, streams = of_torchair(lowered["tiny_pipeline_whole"], rank, "")
    assert mine.collectives == streams and not made.exact
    assert sum(ops.values()) <= mine.total <= 1.03 * sum(ops.values())


@pytest.mark.parametrize("job", ["tiny_calls", "tiny_pipeline"])
def test_and_of_each_graph_of_form_calls(job, lowered):
    pieces = counted(lowered_of(job, 0).graph_module).in_form("calls").graphs
    assert len(pieces) > 2 and max(piece.runs for piece in pieces) == 4
    for piece in pieces:
        ops, streams = of_torchair(lowered[job], 0, piece.name)
        assert piece.ops == ops, piece.name
        assert piece.collectives == streams
