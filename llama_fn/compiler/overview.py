"""What a notebook shows of a stage: a few lines of text, and a table by scope as HTML."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from html import escape
from typing import Protocol

import torch

from kernels.scope_names import layer, without_numbers
from llama_fn import html
from llama_fn.compiler import calls, cost, ir
from llama_fn.compiler.liveness import Memory
from sharding import collectives_table

HINT = f'print() shows the graph, as_text(scope="{layer(0)}") a part of it'


class Shown(Protocol):
    """What is asked of a stage."""

    @property
    def title(self) -> str:
        """What it is of."""

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """Its graph."""

    def cost_analysis(self) -> cost.Cost:
        """What it costs."""

    def memory_analysis(self) -> Memory:
        """What it takes."""


def text(stage: Shown, also: Iterable[str] = ()) -> str:
    """Name, mesh, ops, FLOPs, peak and collectives, each in few words; `also`: more lines."""
    return "\n  ".join([f"{stage.title}:", *_facts(stage), *also, HINT])


def page(stage: Shown, also: Iterable[str] = ()) -> str:
    """The same as HTML, and behind it what each scope costs; layers and microbatches are taken together."""
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in [*_facts(stage), *also])
    head = ("scope", "ops", "GFLOP", "MB moved")
    tables = "".join(
        f"<details><summary>{escape(phase)}</summary>{html.table(head, rows)}</details>"
        for phase, rows in _by_scope(stage).items()
    )
    return f"<b>{escape(stage.title)}</b><ul>{facts}</ul>{tables}<small>{escape(HINT)}</small>"


def _facts(stage: Shown) -> list[str]:
    counted, memory = stage.cost_analysis(), stage.memory_analysis()
    flops = ", ".join(f"{phase} {n / 1e9:.3g}" for phase, n in counted.flops.items() if n)
    facts = [
        f"{sum(counted.ops.values()):,} ops, {counted.total_flops / 1e9:.4g} GFLOP ({flops or 'no products'})",
        f"peak {memory.peak_bytes / 1e6:,.1f} MB, arguments {memory.argument_bytes / 1e6:,.1f} MB of it"
        + (f"; the peak is at {memory.peak_at}" if memory.peak_at else ""),
    ]
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in collectives_table.collectives(calls.counted(stage.graph_module)):
        total = kinds[f"{row.kind} over {row.axis}"]
        total[0], total[1] = total[0] + row.count, total[1] + row.count * row.bytes
    if kinds:
        each = (f"{count} {kind} ({sent / 1e6:,.1f} MB)" for kind, (count, sent) in sorted(kinds.items()))
        facts.append(f"a device sends: {', '.join(each)}")
    return facts


def _by_scope(stage: Shown) -> dict[str, list[tuple[str, int, float, float]]]:
    """By phase: scope, ops, GFLOP, MB; what costs most first."""
    totals: dict[str, dict[str, list[int]]] = {phase: {} for phase in ir.PHASES}
    for node, times in calls.counted(stage.graph_module):
        row = totals[ir.phase_of(node)].setdefault(without_numbers(ir.scope_of(node)) or "(none)", [0, 0, 0])
        for i, value in enumerate((1, cost.flops_of(node), cost.moved(node))):
            row[i] += times * value
    return {
        phase: [
            (scope, ops, round(flops / 1e9, 3), round(moved / 1e6, 2))
            for scope, (ops, flops, moved) in sorted(rows.items(), key=lambda item: (-item[1][1], -item[1][2]))
        ]
        for phase, rows in totals.items()
        if rows
    }
