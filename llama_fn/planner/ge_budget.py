"""The budget of GE graphs (ascend/budget.py) for a step of any depth and number of microbatches, from small ones.

Layers are alike, so each count grows by the same from layer to layer; from five microbatches on a further one is a
further run of the same pieces.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from llama_fn.ascend.budget import Budget, GraphCounts, advice
from llama_fn.compiler.backends.ge_choice import choose, remedies
from llama_fn.compiler.backends.ge_counts import Pieces, counted
from llama_fn.compiler.stages import Lowered
from llama_fn.config import Config
from llama_fn.errors import UserError
from llama_fn.hardware import Hardware
from llama_fn.planner import config_stages, piped
from sharding import Mesh
from sharding.stages import stage_count

FEW = 4  # layers, of which the first and the last differ from the others
ROLLED = 6  # microbatches of which those between the first and the last are runs of one graph


def make(cfg: Config, mesh: Mesh, hardware: Hardware) -> tuple[Budget, str] | None:
    """Of the device whose graphs have most ops, in the form that --run.npu_form chooses, and why, with what would need
    less where that may not load; None for hardware without a graph engine."""
    if not hardware.name.startswith("ascend"):
        return None
    of_device = pieces(cfg, mesh)
    made, why = choose(of_device, cfg.run.npu_form)
    instead = remedies(of_device, made)
    doubt = advice(made, instead) or (made.passed and f"they {made.passed}. Instead:\n  " + "\n  ".join(instead))
    return made, f"{why}\n{doubt}" if doubt else why


def pieces(cfg: Config, mesh: Mesh) -> Pieces:
    """Of the device whose graphs have most ops."""
    return max(_stages(cfg, mesh), key=lambda each: each.in_form("whole").total)


def _stages(cfg: Config, mesh: Mesh) -> list[Pieces]:
    if stage_count(mesh) > 1:
        held, _ = piped.work(cfg, mesh)
        whole, whole_larger = (_lowered(piped.small(cfg, held, piped.SMALL + more), mesh) for more in (0, 1))
        has = piped.small(cfg, held, piped.SMALL).data.microbatches
        times, steps = cfg.data.microbatches / has, max(held.sizes) - piped.SMALL
        pairs = zip(whole.by_stage, whole_larger.by_stage, strict=True)
        counts = ((counted(a.graph_module), counted(b.graph_module)) for a, b in pairs)
        return [_more_runs(_deeper(a, b, steps, (has, cfg.data.microbatches)), times, 0) for a, b in counts]
    microbatches = min(cfg.data.microbatches, ROLLED)
    repeats = cfg.model.num_layers > FEW + 1 and cfg.mesh.remat != "budget"
    sizes = (FEW, FEW + 1) if repeats else (cfg.model.num_layers,) * 2
    small, larger = (counted(_lowered(config_stages.small(cfg, n, microbatches), mesh).graph_module) for n in sizes)
    steps = cfg.model.num_layers - FEW if repeats else 0
    deep = _deeper(small, larger, steps, (microbatches, cfg.data.microbatches))
    return [_more_runs(deep, 1, cfg.data.microbatches - microbatches)]


def _lowered(cfg: Config, mesh: Mesh) -> Lowered:
    return config_stages.lower(config_stages.train(cfg), cfg, mesh)


def _deeper(small: Pieces, larger: Pieces, steps: int, microbatches: tuple[int, int]) -> Pieces:
    """`larger` has a layer more than `small` in each part of the model; the result has `steps` more. Both have as many
    microbatches as the first of two numbers says, and the result takes as many apart as the second."""
    few, many = microbatches
    if [piece.name for piece in small.each] != [piece.name for piece in larger.each]:
        raise UserError("the planner cannot tell from a few layers what many take: their GE graphs have other names")

    def beyond(a: Counter[str], b: Counter[str]) -> Counter[str]:
        return Counter({kind: a[kind] + steps * (b[kind] - a[kind]) for kind in a | b})

    each = tuple(
        GraphCounts(
            a.name, a.runs, beyond(a.ops, b.ops), beyond(a.collectives, b.collectives),
            tuple(sorted(many if m == n == few else m + steps * (n - m) for m, n in zip(a.wide, b.wide, strict=True))),
            a.computed, beyond(a.joinable, b.joinable),
        )
        for a, b in zip(small.each, larger.each, strict=True)
    )  # fmt: skip
    return Pieces(each, small.between, small.constants)


def _more_runs(pieces: Pieces, times: float, more: int) -> Pieces:
    """Pieces that run several times run `times` as often, and `more` times more; messages between them likewise."""
    each = tuple(
        replace(piece, runs=round(piece.runs * times) + more) if piece.runs > 1 else piece for piece in pieces.each
    )
    sent = {kind for kind in pieces.between.ops if kind in ("HcomSend", "HcomReceive")}
    between = replace(
        pieces.between,
        ops=Counter({k: round(n * times) if k in sent else n for k, n in pieces.between.ops.items()}),
        collectives=Counter({
            k: round(n * times) if k.startswith(("send_", "receive_")) else n
            for k, n in pieces.between.collectives.items()
        }),
    )  # fmt: skip
    return Pieces(each, between, pieces.constants)
