"""The table of a step's collectives: what goes over which axis, how many bytes, and who asked for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.registry import of_node
from kernels.scope_names import without_numbers
from sharding.collectives import communicates, sent_bytes
from sharding.fused import UNFUSED, sent
from sharding.messages import send, sends_bytes


@dataclass(frozen=True, order=True)
class Collective:
    """`bytes`: what one device sends for one of them (ring, or direct for all_to_all); `count`: how often in a step.

    Layers, and microbatches, are one row: their number in the scope is a star.
    """

    phase: str
    scope: str
    kind: str
    axis: str
    dtype: str
    bytes: int
    source: str
    count: int = 1


def collectives(counted: Iterable[tuple[torch.fx.Node, int]]) -> list[Collective]:
    """Rows in the order of their first appearance among the ops of a per-device graph, of which each comes with how
    often it runs."""
    rows: dict[Collective, int] = defaultdict(int)
    for node, times in counted:
        row = row_of(node)
        if row is not None:
            rows[row] += times
    return [replace(row, count=count) for row, count in rows.items()]


def kind_of(node: torch.fx.Node) -> str:
    """The collective that a node is, fused ones included; "" for anything else."""
    kernel = of_node(node.target) if node.op == "call_function" else None
    return kernel.name if kernel is not None and kernel.name in UNFUSED else communicates(kernel)


def row_of(node: torch.fx.Node) -> Collective | None:
    """The row of one node, with count 1; None for what sends nothing."""
    name = kind_of(node)
    if node.target is send.op:
        return _message(node)
    if not name:
        return None
    args: Any = node.args
    x, axes, n = args[0].meta["val"], args[1], args[2]
    kind, size = name, sent_bytes(name, x, n) if name not in UNFUSED else 0
    if name == "all_reduce" and args[3] != "sum":
        kind = f"all_reduce_{args[3]}"
    if name in UNFUSED:
        axes, size = args[2], sent(name, [a.meta["val"] if hasattr(a, "meta") else a for a in args])
    labels = node.meta.get("custom", {})
    return Collective(
        phase=labels.get("phase", ""), scope=without_numbers(labels.get("scope", "")), kind=kind, axis=axes,
        dtype=str(x.dtype).removeprefix("torch."), bytes=size, source=labels.get("source", ""),
    )  # fmt: skip


def _message(node: torch.fx.Node) -> Collective:
    """The row of a message, on the side that sends it."""
    args: Any = node.args
    labels = node.meta.get("custom", {})
    return Collective(
        phase=labels.get("phase", ""), scope=without_numbers(labels.get("scope", "")), kind="send", axis=args[1],
        dtype=str(args[0].meta["val"].dtype).removeprefix("torch."), bytes=sends_bytes(node),
        source=labels.get("source", ""),
    )  # fmt: skip


def as_text(rows: Iterable[Collective]) -> str:
    """Aligned columns, then the totals per axis."""
    rows = list(rows)
    head = ("count", "kind", "axis", "dtype", "MB each", "phase", "scope", "source")
    lines = [(str(r.count), r.kind, r.axis, r.dtype, f"{r.bytes / 1e6:.3f}", r.phase, r.scope, r.source) for r in rows]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *lines)]
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for r in rows:
        totals[r.axis][0] += r.count
        totals[r.axis][1] += r.count * r.bytes
    text += [
        f"total over {axis}: {n} collectives, {size / 1e6:.3f} MB sent per device" for axis, (n, size) in totals.items()
    ]
    return "\n".join(text)
