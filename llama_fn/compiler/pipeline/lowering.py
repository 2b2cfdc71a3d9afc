"""From the traced graph to the programs of all stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_fn import compat
from llama_fn.compiler import calls, passes
from llama_fn.compiler.passes.partition import partition
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.compiler.pipeline.check import check
from llama_fn.compiler.pipeline.cut import Cut
from llama_fn.compiler.pipeline.program import program
from llama_fn.compiler.shorten import beginning
from llama_fn.compiler.signature import Signature
from llama_fn.errors import UserError
from sharding.mesh import Mesh
from sharding.partition import Partitioned
from sharding.rules import Rules
from sharding.schedules import WEIGHT, Order, order_of
from sharding.stages import Pipeline, Stages, stage_count, stages_of

# What works on the ops of one stage, once the graph is cut: where collectives stand, and what is written at the end.
OF_A_STAGE = (passes.bucket, passes.overlap, passes.schedule, passes.donation)
# The cut does what the first two do, and takes the forward and the backward apart that the third joins.
OF_NO_PIPELINE = (passes.regather, passes.roll, passes.join_loss)


def stages_for(signature: Signature, mesh: Mesh, pipeline: Pipeline) -> Stages | None:
    """The parts of the model that the signature's stacked parameters are of, None on a mesh without stages; UserError
    where nothing is stacked, or the layers do not go."""
    count = stage_count(mesh)
    if count == 1:
        return None
    stacked = {info.shape[0] for info in signature.in_infos if info.axes[:1] == ("layers",)}
    if len(stacked) != 1:
        found = f"of {sorted(stacked)} layers" if stacked else "none"
        raise UserError(
            f"mesh {mesh} has {count} stages, and a pipeline is cut between layers: it needs parameters stacked along "
            f"a first logical axis layers, all of one number, and the arguments have {found}"
        )
    try:
        return stages_of(pipeline, count, stacked.pop())
    except ValueError as error:
        raise UserError(f"mesh {mesh}: {error}") from None


def stage_graphs(
    gm: torch.fx.GraphModule, signature: Signature, mesh: Mesh, rules: Rules, chosen: Sequence[passes.Pass],
    remat: Remat, observe: passes.Observer, stages: Stages, schedule: str,
) -> tuple[tuple[torch.fx.GraphModule, ...], Partitioned]:  # fmt: skip
    """The graph of a device of each stage, and how inputs and outputs are sharded."""
    short, microbatches = beginning(gm)
    if not microbatches:
        raise UserError(
            f"mesh {mesh} has {stages.count} stages, which work on different microbatches at a time, and this function "
            "has none: compute its loss with transforms.accumulate or fold"
        )
    flat = passes.written_out(short)
    parts = partition(flat, mesh, rules, signature.in_infos, signature.aliases, signature.in_paths, stages)
    flat = compat.graph_module(flat, parts.graph)
    observe("partitioned", flat)
    of_all = [each for each in chosen if each not in (*OF_A_STAGE, *OF_NO_PIPELINE)]
    context = passes.Context(mesh, signature.aliases, remat)
    flat = passes.run(of_all, flat, context, observe)
    order = _order(schedule, stages, microbatches, flat)
    cut = Cut(flat, len(stages.sizes), any(work.kind == WEIGHT for works in order for work in works), remat.gathers)
    placing = [each for each in chosen if each in OF_A_STAGE]
    graphs = [program(flat, cut, stages, stage, works) for stage, works in enumerate(order)]
    graphs = [_placed(each, placing, context) for each in graphs]
    check(graphs)
    return tuple(graphs), parts


def _order(schedule: str, stages: Stages, microbatches: int, gm: torch.fx.GraphModule) -> Order:
    has_backward = any(compat.labels(node).get("phase") == "backward" for node in gm.graph.nodes)
    try:
        return order_of(schedule, stages.count, microbatches, len(stages.sizes) // stages.count, has_backward)
    except ValueError as error:
        raise UserError(str(error)) from None


def _placed(gm: torch.fx.GraphModule, placing: Sequence[passes.Pass], context: passes.Context) -> torch.fx.GraphModule:
    """`gm` with the collectives of each of its bodies, and its own, where they cost least."""
    inside = [each for each in placing if each is not passes.donation]
    for body in calls.bodies(gm):
        passes.run(inside, body, context)
    outside = [each for each in placing if each not in (passes.overlap, passes.schedule)]
    return passes.run(outside, gm, context)
