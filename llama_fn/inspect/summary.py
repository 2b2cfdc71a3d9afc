"""The summary of a lowered step (summary.json of a dump): what two dumps are compared by (inspect/changes.py)."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kernels.scope_names import without_numbers
from llama_fn import compat
from llama_fn.compiler import calls, cost, ir, stages
from llama_fn.compiler.passes.fuse import report as fusion_report
from llama_fn.compiler.passes.remat import RECOMPUTED
from llama_fn.model.arrays import SHORT


@dataclass(frozen=True)
class _Op:
    """What two ops must share to be one row. `constants`: arguments that are no tensors; `dtype` and `sharding` are the
    result's."""

    scope: str
    phase: str
    op: str
    recomputed: bool
    constants: str
    dtype: str
    sharding: str


@dataclass
class _Totals:
    count: int = 0
    flops: int = 0
    bytes: int = 0
    sources: dict[str, None] = field(default_factory=dict)


def summary(lowered: stages.Lowered) -> dict[str, Any]:
    """Counts of one device's graph, for JSON. Layers and microbatches are taken together: numbers in scopes are stars.

    `ops`: a row per scope, phase, op, constants, dtype and sharding, with its count, matrix FLOPs, bytes of memory read
    and written, and source lines. `collectives`: the rows of sharding/collectives_table.py. `donated`: paths of the
    inputs that the step overwrites. `flops`: by phase. `memory`: bytes (compiler/liveness.py).
    """
    rows: dict[_Op, _Totals] = {}
    for node, times in calls.counted(lowered.graph_module):
        if node.target is operator.getitem:
            continue
        totals = rows.setdefault(_op(node), _Totals())
        totals.count += times
        totals.flops += times * cost.flops_of(node)
        totals.bytes += times * cost.moved(node)
        totals.sources[str(compat.labels(node).get("source", ""))] = None
    return {
        "title": lowered.title,
        "mesh": str(lowered.mesh),
        "rules": lowered.rules.name,
        "ops": [asdict(op) | asdict(n) | {"sources": list(filter(None, n.sources))} for op, n in rows.items()],
        "collectives": [asdict(row) for row in lowered.collectives()],
        "donated": [lowered.signature.in_paths[i] for i in ir.written(lowered.graph_module.graph)],
        "fusion": fusion_report(calls.counted(lowered.graph_module)),
        "flops": lowered.cost_analysis().flops,
        "memory": asdict(lowered.memory_analysis()),
    }


def _op(node: torch.fx.Node) -> _Op:
    constants = [repr(a) for a in (*node.args, *node.kwargs.values()) if _is_constant(a)]
    value = compat.node_value(node)
    several = value if isinstance(value, (tuple, list)) else [value]
    dtypes = dict.fromkeys(SHORT.get(v.dtype, str(v.dtype)) for v in several if isinstance(v, torch.Tensor))
    return _Op(
        scope=without_numbers(ir.scope_of(node)), phase=ir.phase_of(node), op=ir.target_text(node),
        recomputed=compat.labels(node).get("note") == RECOMPUTED, constants=", ".join(constants),
        dtype="/".join(dtypes), sharding=str(node.meta.get("sharding", "")),
    )  # fmt: skip


def _is_constant(argument: Any) -> bool:
    nodes: list[torch.fx.Node] = []
    torch.fx.node.map_arg((argument,), nodes.append)
    return not nodes and argument is not None
