"""A donated input is written as early as nothing reads its old value any more, and read in place of the new one."""

from dataclasses import replace

import pytest
import torch

from llama_fn import compat, tree
from llama_fn.compiler import calls, ir, passes, stages
from llama_fn.compiler.backends import forms
from llama_fn.compiler.passes.copy_early import COPY, copy_early
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.pieces import in_pieces
from llama_fn.model import train_step
from llama_fn.model.arrays import ArrayInfo


def written_at_the_end(fn):
    """`fn` of two vectors as a lowered graph in aten's ops: its first result is copied into its first input."""
    step = stages.jit(fn, donate=0).trace(*[ArrayInfo((4,), torch.float32)] * 2).lower()
    return expand(passes.copy_graph(step.graph_module), {}, forms.find, compat.inductor_decompositions())


def read_late(old, update):
    new = old + update
    return new, new.sum(), old.view(2, 2)[0].sum(), new.exp(), update.sum()


def read_through_a_view(old, update):
    view = old.view(2, 2)
    new = old + update
    return new, new.sum(), view[1].sum(), new.exp()


def returned(old, update):
    new = old * update
    return new, new, old.sum()


@pytest.mark.parametrize("fn", [read_late, read_through_a_view, returned])
def test_the_numbers_are_the_same(fn):
    given = torch.arange(4.0), torch.full((4,), 0.5)
    plain = [x.clone() for x in given]
    want = written_at_the_end(fn)(*plain)
    early = [x.clone() for x in given]
    got = copy_early(written_at_the_end(fn))(*early)
    assert all(map(torch.equal, [*want, *plain], [*got, *early]))


def test_what_reads_a_new_value_behind_the_last_reader_of_the_old_one_reads_that_memory():
    gm = copy_early(written_at_the_end(read_late))
    names = [str(node.target) for node in ir.calls(gm.graph)]
    copy = names.index(str(COPY))
    assert copy == names.index("aten.sum.default", names.index("aten.select.int")) + 1
    exp = ir.calls(gm.graph)[names.index("aten.exp.default")]
    assert exp.args[0] is ir.calls(gm.graph)[copy] and copy < names.index("aten.exp.default")


@pytest.mark.parametrize("microbatches", [1, 3])
def test_no_new_parameter_of_a_step_with_norms_waits_for_the_end(microbatches, tiny_config):
    cfg = tiny_config()
    cfg = replace(cfg, data=replace(cfg.data, microbatches=microbatches, global_batch_size=6))
    cfg = replace(cfg, run=replace(cfg.run, norms_every=5))
    arguments = train_step.abstract_arguments(cfg)
    step = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*arguments).lower()
    gm = in_pieces(passes.copy_graph(step.graph_module))
    gm = expand(gm, {"barrier": "reference"}, forms.find, compat.inductor_decompositions())
    copies = 0
    for body in calls.bodies(gm):
        order = {node: i for i, node in enumerate(copy_early(body).graph.nodes)}
        for copy in [node for node in ir.calls(body.graph) if node.target is COPY]:
            copies += 1
            assert all(order[user] <= order[copy] for user in copy.args[1].users if user.op != "output")
    assert copies >= 3 * len(tree.leaves(arguments[0].params))
