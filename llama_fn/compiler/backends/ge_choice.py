"""In which form a step becomes GE graphs, and what would take less of a device: by the counts of ge_counts.py."""

from __future__ import annotations

import math
from collections import Counter

import torch

from kernels.scope_names import without_numbers
from llama_fn.ascend.budget import LONG_S, STREAMS, Budget
from llama_fn.compiler import calls, ir
from llama_fn.compiler.backends.ge_counts import Pieces
from sharding import collectives_table


def choose(pieces: Pieces, form: str) -> tuple[Budget, str]:
    """The GE graphs in the form that is asked for, auto being whole where that surely loads and GE compiles it in less
    than half an hour; and why."""
    whole, called = (pieces.in_form(each) for each in ("whole", "calls"))
    told = (
        f"written out, the step has {whole.total:,} ops and needs {whole.streams('AIV'):,} to "
        f"{whole.streams('HOST'):,} of {STREAMS} streams; GE would compile it in some {whole.compile_s / 60:.0f} min"
    )
    if len(pieces.each) == 1:
        return whole, f"{told}. It calls nothing"
    if form != "auto":
        return {"whole": whole, "calls": called}[form], f"{told}. Asked for by --run.npu_form"
    if whole.loads and whole.compile_s <= LONG_S:
        return whole, told
    return called, f"{told}, in pieces {called.total:,} ops in {called.compile_s / 60:.0f} min"


def remedies(pieces: Pieces, made: Budget) -> list[str]:
    """What would need fewer streams than `made`, and how many, a line each."""

    def needs(other: Budget) -> str:
        return f"{other.streams('AIV'):,} to {other.streams('HOST'):,} streams"

    lines = []
    if made.form == "whole" and len(pieces.each) > 1:
        lines.append(f"--run.npu_form=calls: {needs(pieces.in_form('calls'))}")
        lines.append(f"half the --data.microbatches, of twice the size: {needs(pieces.halved().in_form('whole'))}")
    if any(piece.joinable for piece in pieces.each):
        joined = needs(pieces.bucketed().in_form(made.form))
        lines.append(f"bucket, the pass that joins small collectives (--mesh.without leaves it out): {joined}")
    few, many = (math.ceil(made.streams(mode) / 2) for mode in ("AIV", "HOST"))
    lines.append(
        f"twice as many stages (pipe:N in --mesh.axes), each of half the layers: some {few:,} to {many:,} streams"
    )
    return lines


def most_collectives(gm: torch.fx.GraphModule) -> str:
    """Which passes, scopes and axes have most of the collectives of a step, and how many."""
    rows: Counter[str] = Counter()
    for node, times in calls.counted(gm):
        if (row := collectives_table.row_of(node)) is not None:
            place = f"{without_numbers(ir.scope_of(node))}, {ir.phase_of(node)}, made by {ir.made_by(node)}"
            rows[f"{row.kind} over {row.axis} in {place}"] += times
    return "; ".join(f"{n:,} {what}" for what, n in rows.most_common(3)) or "none"
