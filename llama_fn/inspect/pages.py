"""The index of a dump as one HTML page without scripts or anything from the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llama_fn.hardware import Hardware
from llama_fn.html import document, table

INDEX, SUMMARY = "index.html", "summary.json"  # here, so that graph_diff need not import torch


def page(
    title: str, summary: Mapping[str, Any], files: Mapping[str, int], hardware: Hardware | None, origin: str = "",
    ge: Sequence[str] = (),
) -> str:  # fmt: skip
    """`files`: their sizes by name; `hardware`: whose peaks the overlay of times takes; `origin`: of the code; `ge`:
    lines on the budget of GE graphs."""
    memory, flops = summary["memory"], summary["flops"]
    by_op: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in summary["ops"]:
        totals = by_op[row["op"] + (" recomputed" if row["recomputed"] else "")]
        totals[0] += row["count"]
        totals[1] += row["flops"]
    links = ((f"<a href='{escape(name)}'>{escape(name)}</a>", size) for name, size in files.items())
    graphs = [name for name in files if name.endswith(".json") and name.count(".") == 1 and name[:2].isdigit()]
    times = f"<code>.time.json</code> (µs at the peaks of {escape(hardware.name)}), " if hardware else ""
    parts = [
        f"<p>Runs {escape(origin)}.</p>" if origin else "",
        "<h2>Stages</h2>", table(("file", "bytes"), links),
        f"<p>In a browser, layers collapsed: <code>model-explorer {' '.join(map(escape, graphs))}</code>; the files "
        f"{times}<code>.bytes.json</code> and <code>.flops.json</code> colour its nodes (Add per-node data).</p>",
        "<h2>Memory of one device, bytes</h2>", table(("what", "size"), memory.items()),
        "<h2>FLOPs of one device</h2>", table(("phase", "FLOPs"), flops.items()),
        "<h2>Collectives</h2>",
        table(
            ("count", "kind", "axis", "dtype", "bytes each", "phase", "scope", "source"),
            ([r[k] for k in ("count", "kind", "axis", "dtype", "bytes", "phase", "scope", "source")]
             for r in summary["collectives"]),
        ) if summary["collectives"] else "<p>none</p>",
        *([f"<h2>GE graphs</h2><pre>{escape(chr(10).join(ge))}</pre>"] if ge else []),
        *_fusion(summary["fusion"]),
        "<h2>Ops</h2>",
        table(("op", "count", "FLOPs"), ([op, *n] for op, n in sorted(by_op.items(), key=lambda item: -item[1][0]))),
    ]  # fmt: skip
    return document(title, "".join(parts))


def _fusion(lines: Sequence[str]) -> list[str]:
    return ["<h2>Fused, or why not</h2>", table(("where and why",), [[line] for line in lines])] if lines else []
