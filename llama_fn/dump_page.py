"""The index of a dump as one HTML page without scripts or anything from the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

INDEX, SUMMARY = "index.html", "summary.json"  # here, so that graph_diff need not import torch
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #1d2733 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } code { background: #eef2f6; padding: 0 .3em }
table { border-collapse: collapse; font-size: .9em } th { text-align: left; border-bottom: 2px solid #9fb0c0 }
td, th { padding: .15em .9em .15em 0 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
tr + tr td { border-top: 1px solid #e3e9ef } a { color: #0b5cad }
"""


def document(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1>{body}</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers to the right; a cell that begins with "<" is HTML already."""

    def cell(tag: str, value: Any, number: bool) -> str:
        text = f"{value:,}" if isinstance(value, int) else str(value)
        return f"<{tag}{' class=n' if number else ''}>{text if text.startswith('<') else escape(text)}</{tag}>"

    lines = [list(row) for row in rows]
    numbers = [all(isinstance(row[i], (int, float)) for row in lines) for i in range(len(head))]
    top = "".join(cell("th", name, number) for name, number in zip(head, numbers, strict=True))
    rest = "".join(
        "<tr>" + "".join(cell("td", v, n) for v, n in zip(row, numbers, strict=True)) + "</tr>" for row in lines
    )
    return f"<table><tr>{top}</tr>{rest}</table>"


def page(title: str, summary: Mapping[str, Any], files: Mapping[str, int]) -> str:
    memory, flops = summary["memory"], summary["flops"]
    by_op: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in summary["ops"]:
        by_op[row["op"]][0] += row["count"]
        by_op[row["op"]][1] += row["flops"]
    links = ((f"<a href='{escape(name)}'>{escape(name)}</a>", size) for name, size in files.items())
    graphs = [name for name in files if name.endswith(".json") and name.count(".") == 1 and name[:2].isdigit()]
    parts = [
        "<h2>Stages</h2>", table(("file", "bytes"), links),
        f"<p>In a browser, layers collapsed: <code>model-explorer {' '.join(map(escape, graphs))}</code>; the files "
        "<code>.time.json</code> (µs at the device's peaks), <code>.bytes.json</code> and <code>.flops.json</code> "
        "colour its nodes (Add per-node data).</p>",
        "<h2>Memory of one device, bytes</h2>", table(("what", "size"), memory.items()),
        "<h2>FLOPs of one device</h2>", table(("phase", "FLOPs"), flops.items()),
        "<h2>Collectives</h2>",
        table(
            ("count", "kind", "axis", "dtype", "bytes each", "phase", "scope", "source"),
            ([r[k] for k in ("count", "kind", "axis", "dtype", "bytes", "phase", "scope", "source")]
             for r in summary["collectives"]),
        ) if summary["collectives"] else "<p>none</p>",
        *_fusion(summary["fusion"]),
        "<h2>Ops</h2>",
        table(("op", "count", "FLOPs"), ([op, *n] for op, n in sorted(by_op.items(), key=lambda item: -item[1][0]))),
    ]  # fmt: skip
    return document(title, "".join(parts))


def _fusion(lines: Sequence[str]) -> list[str]:
    return ["<h2>Fused, or why not</h2>", table(("where and why",), [[line] for line in lines])] if lines else []
