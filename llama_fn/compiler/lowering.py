"""From the traced graph, which calls a body for each microbatch, to the graph of one device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from llama_fn import compat, progress
from llama_fn.compiler import passes
from llama_fn.compiler.alike import NotAlike
from llama_fn.compiler.passes.partition import partition
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.compiler.pipeline.lowering import stage_graphs, stages_for
from llama_fn.compiler.shorten import ALIKE, Missing, shortened
from llama_fn.compiler.signature import Signature
from sharding.mesh import Mesh
from sharding.partition import Partitioned
from sharding.rules import Rules
from sharding.stages import Pipeline

log = logging.getLogger("llama_fn.lowering")
PARTITIONED = 0.5  # of the time that lowering takes


def lowered_graphs(
    gm: torch.fx.GraphModule, signature: Signature, mesh: Mesh, rules: Rules, chosen: Sequence[passes.Pass],
    remat: Remat, observe: passes.Observer, pipeline: Pipeline,
) -> tuple[tuple[torch.fx.GraphModule, ...], Partitioned, Rules]:  # fmt: skip
    """The graph of a device of each stage, which is one without a pipeline, after the passes `chosen`; how inputs and
    outputs are sharded, and the rules by which they are."""
    stages = stages_for(signature, mesh, pipeline)
    if stages is None:
        one, parts = _lowered_graph(gm, signature, mesh, rules, chosen, remat, observe)
        return (one,), parts, rules
    rules = replace(rules, blocks=stages.sizes)
    graphs, parts = stage_graphs(gm, signature, mesh, rules, chosen, remat, observe, stages, pipeline.schedule)
    return graphs, parts, rules


def _lowered_graph(
    gm: torch.fx.GraphModule, signature: Signature, mesh: Mesh, rules: Rules, chosen: Sequence[passes.Pass],
    remat: Remat, observe: passes.Observer,
) -> tuple[torch.fx.GraphModule, Partitioned]:  # fmt: skip
    """The graph of one device after the passes `chosen`, and how its inputs and outputs are sharded.

    It is made from a few of the microbatches, for which passes/roll.py then puts calls; where that fails, from all.
    """

    def lowered(gm: torch.fx.GraphModule, missing: Missing | None) -> tuple[torch.fx.GraphModule, Partitioned]:
        with progress.span(0.0, PARTITIONED):
            flat = passes.written_out(gm)
        parts = partition(flat, mesh, rules, signature.in_infos, signature.aliases, signature.in_paths)
        flat = compat.graph_module(flat, parts.graph)
        observe("partitioned", flat)
        with progress.span(PARTITIONED, 1.0):
            return passes.run(chosen, flat, passes.Context(mesh, signature.aliases, remat, missing), observe), parts

    # What the second microbatch alone does, such as waiting for a reduction that the first began and did not add to a
    # sum, the third does not.
    for before in (ALIKE, ALIKE + 1):
        try:
            return lowered(*shortened(gm, before))
        except NotAlike as difference:
            why = difference
    log.warning("every microbatch is lowered by itself, as those between the first and the last differ: %s", why)
    return lowered(gm, None)
