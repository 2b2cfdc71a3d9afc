"""Graph passes, in order. A pass is `fn(gm, ctx) -> gm`; what it changed is logged by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llama_fn import progress
from llama_fn.compiler import calls
from llama_fn.compiler.passes.bucket import bucket
from llama_fn.compiler.passes.dead_code import dead_code
from llama_fn.compiler.passes.donation import donation
from llama_fn.compiler.passes.fuse import fuse
from llama_fn.compiler.passes.join_loss import join_loss
from llama_fn.compiler.passes.overlap import overlap
from llama_fn.compiler.passes.regather import regather
from llama_fn.compiler.passes.remat import remat
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.compiler.passes.roll import roll
from llama_fn.compiler.passes.schedule import schedule
from llama_fn.compiler.passes.scopes import scopes
from llama_fn.compiler.passes.sink_casts import sink_casts
from llama_fn.compiler.shorten import Missing
from sharding.mesh import Mesh

log = logging.getLogger("llama_fn.passes")


@dataclass(frozen=True)
class Context:
    """What a pass may know: the mesh, which (input, output) leaves share a buffer, what to compute again, and the
    microbatches that the graph stands for and lacks."""

    mesh: Mesh
    aliases: Sequence[tuple[int, int]]
    remat: Remat = field(default_factory=Remat)
    missing: Missing | None = None


Pass = Callable[[torch.fx.GraphModule, Context], torch.fx.GraphModule]

TRACING: list[Pass] = [scopes, dead_code]
LOWERING: list[Pass] = [
    sink_casts,
    join_loss,
    remat,
    regather,
    dead_code,
    fuse,
    bucket,
    overlap,
    schedule,
    roll,
    donation,
]
OPTIONAL = ("sink_casts", "bucket", "overlap", "schedule")  # what a user may leave out: the numbers do not depend on it


Observer = Callable[[str, torch.fx.GraphModule], None]  # sees a graph after each stage, by the stage's name


def unobserved(name: str, gm: torch.fx.GraphModule) -> None:
    """Nobody looks."""


def run(
    passes: Sequence[Pass], gm: torch.fx.GraphModule, ctx: Context, observe: Observer = unobserved
) -> torch.fx.GraphModule:
    """The graph after `passes`, which may change the given one; `observe` sees it after each."""
    for each in progress.tracked(passes, lambda each: each.__name__):
        before = len(gm.graph.nodes)
        gm = each(gm, ctx)
        log.debug("%s: %d -> %d nodes", each.__name__, before, len(gm.graph.nodes))
        observe(each.__name__, gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def written_out(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A traced graph with its calls written out."""
    return run(TRACING, calls.inlined(gm), Context(Mesh(), []))


def copy_graph(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A graph module with its own nodes, the bodies that it calls too; metadata values (fake tensors) are shared."""
    return calls.inlined(gm, lambda _: False)
