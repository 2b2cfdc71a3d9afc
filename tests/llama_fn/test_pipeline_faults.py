"""What a pipeline refuses, what the check of its programs finds, and that a fault is seen."""

from __future__ import annotations

import re

import pytest
import torch
from pipelines import on_one_device, traced, trained

from llama_fn import compat
from llama_fn.compiler import ir, stages
from llama_fn.compiler.pipeline.check import check
from llama_fn.errors import UserError
from llama_fn.model import arrays
from llama_fn.model.transforms import named_scope
from sharding import Mesh, P, constrain, schedules
from sharding.messages import MESSAGES, over_stages, receive, send
from sharding.stages import Pipeline, Stages


def bad(step, mesh="pipe:2", pipeline=None):
    with pytest.raises(UserError) as error:
        step.lower(Mesh.parse(mesh), pipeline=pipeline)
    return str(error.value)


def test_what_cannot_be_a_pipeline_is_told():
    _, step = traced()
    assert "4 layers are fewer than 8 stages x 1 chunks" in bad(step, "pipe:8")
    assert "--mesh.chunks=3 does not divide 4 layers; it can be [1, 2]" in bad(
        step, pipeline=Pipeline("interleaved", 3)
    )
    assert "one chunk per stage, and 2 are asked for" in bad(step, pipeline=Pipeline("gpipe", 2))
    assert "--mesh.stage_layers=1,2 are 2 numbers whose sum is 3" in bad(step, pipeline=Pipeline("1f1b", 1, (1, 2)))
    assert "4 layers do not divide by 3 stages" in bad(step, "pipe:3")
    _, odd = traced(4, 1)
    assert "1 microbatches are not a multiple of 2 stages; use 2" in bad(odd, pipeline=Pipeline("interleaved", 2))
    flat = stages.jit(lambda x: constrain(x.sum(), P())).trace(arrays.ArrayInfo((4,), torch.float32, ("batch",)))
    assert "parameters stacked along a first logical axis layers" in bad(flat)


def test_a_function_without_microbatches_or_with_layers_apart_is_told():
    stacked = arrays.ArrayInfo((4, 8), torch.float32, ("layers", "embed"))
    whole = stages.jit(lambda w: constrain(w.sum(), P())).trace(stacked)
    assert "this function has none: compute its loss" in bad(whole)

    def mixed(w):
        with named_scope("microbatch/0"):
            first, *_, last = torch.ops.aten.unbind.int(w, 0)
            return constrain((first * last).sum(), P())

    assert "its operands stand on parts" in bad(stages.jit(mixed).trace(stacked))


def programs(edit=None):
    """The stages of a small pipeline, that of stage 1 edited."""
    _, step = traced(4, 4)
    graphs = step.lower(Mesh.parse("pipe:4"), pipeline=Pipeline("1f1b")).graphs
    if edit:
        edit(graphs[1].graph)
    return graphs


def nodes_of(graph, op):
    return [node for node in graph.nodes if node.target is op]


def with_another_tag(graph):
    node = nodes_of(graph, send.op)[2]
    node.args = (*node.args[:-1], 4711)


def with_another_shape(graph):
    node = nodes_of(graph, receive.op)[0]
    node.meta["val"] = compat.node_value(node).new_empty(3)


def in_another_order(graph):
    first, second, *_ = nodes_of(graph, send.op)
    first.args, second.args = (*first.args[:-1], second.args[-1]), (*second.args[:-1], first.args[-1])


def without_a_collective(graph):
    (node, *_) = [n for n in graph.nodes if "all_reduce" in str(n.target) and "pipe" in n.args]
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def waiting_before_sending(graph):
    """It waits for the gradient of what it has not yet sent on."""
    sent = [n for n in nodes_of(graph, send.op) if n.args[-2] == 1]
    first, *_ = [n for n in nodes_of(graph, MESSAGES[2]) if n.args[-2] == 1]
    for node in reversed(sent):
        first.append(node)


@pytest.mark.parametrize(
    "edit, message",
    [
        (with_another_tag, r"from stage 1 to \d: .*send.* has tag 4711, and stage \d asks nothing with that tag"),
        (with_another_shape, r"from stage 0 to 1, tag \d+: .* sends f64\[2,8,32\], and .* asks for f64\[3\]"),
        (in_another_order, r"from stage 1 to 2: .* sends what comes after .* has asked"),
        (without_a_collective, r"stage 0 comes to .* when stage 1 comes to"),
        (waiting_before_sending, r"would wait for ever: .*; stage 1 at .*; stage 2 at"),
    ],
)
def test_programs_that_do_not_go_together_are_found(edit, message):
    check(programs())
    with pytest.raises(UserError, match=message):
        check(programs(edit))


def swapped_entries(monkeypatch, _):
    """The first stage's first two forwards change places."""

    def order(*sizes):
        (first, second, *rest), *others = schedules.one_f_one_b(*sizes)
        return [[second, first, *rest], *others]

    monkeypatch.setitem(schedules.SCHEDULES, "1f1b", order)


def dropped_stash(monkeypatch, graphs):
    """A forward hands its backward another value in the place of one that it should keep."""
    (forward,) = [gm for gm, name in ir.subgraphs(graphs[0]).items() if name == "forward_0"]
    out = ir.output_node(forward.graph)
    kept = list(out.args[0])
    alike = [(i, j) for i, x in enumerate(kept) for j, y in enumerate(kept) if 0 < i < j and same_kind(x, y)]
    i, j = alike[0]
    kept[j] = kept[i]
    out.args = (kept,)


def same_kind(x, y):
    return arrays.describe(compat.node_value(x)) == arrays.describe(compat.node_value(y))


def norm_without_pipe(monkeypatch, graphs):
    """Each stage clips by the norm of its own gradients."""
    for gm in graphs:
        (node, *_) = [n for n in gm.graph.nodes if "optim.py" in compat.labels(n).get("source", "") and over_stages(n)]
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)


def permuted_layers(monkeypatch, _):
    """A stage takes the rows of its two chunks for one another's."""
    slot_of = Stages.slot_of
    monkeypatch.setattr(Stages, "slot_of", lambda self, layer: (slot_of(self, layer) + self.slots // 2) % self.slots)


@pytest.mark.parametrize(
    "fault, pipeline",
    [
        (swapped_entries, Pipeline("1f1b")),
        (dropped_stash, Pipeline("1f1b")),
        (norm_without_pipe, Pipeline("1f1b")),
        (permuted_layers, Pipeline("interleaved", 2)),
        (None, Pipeline("interleaved", 2)),
    ],
)
def test_a_fault_in_a_pipeline_is_seen(fault, pipeline, random_inputs, monkeypatch):
    """Each by the check, by stages that disagree, or by numbers that are not those of one device."""
    cfg, step = traced(4, 4)
    want = on_one_device((4, 4, "fp64", 2, False, False), random_inputs)

    def equal():
        if fault in (swapped_entries, permuted_layers):
            fault(monkeypatch, None)
        lowered = step.lower(Mesh.parse("pipe:2"), pipeline=pipeline)
        if fault in (dropped_stash, norm_without_pipe):
            fault(monkeypatch, lowered.graphs)
        return all(
            torch.allclose(a, b, rtol=0, atol=1e-10)
            for a, b in zip(trained(lowered, cfg, random_inputs), want, strict=True)
        )

    try:
        seen = not equal()
    except (UserError, RuntimeError) as error:
        seen = re.search("sends what comes after|hold different values", str(error)) is not None
    assert seen == (fault is not None)
