"""The index of a dump as one HTML page without scripts or anything from the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fn.hardware import Hardware
from llama_fn.html import document, table

if TYPE_CHECKING:  # graph_diff, which reads names of files here, runs without torch
    from llama_fn.compiler.backends import CodeOrigin

INDEX, SUMMARY = "index.html", "summary.json"  # here, so that graph_diff need not import torch


MEASURED = "<!-- overlay of measured times -->"  # where dump.write_measured puts its link


@dataclass(frozen=True)
class Stage:
    """A numbered part of a dump: its `nodes`, None where it is no graph, and whether they differ from the stage
    before."""

    number: int
    name: str
    nodes: int | None = None
    changed: bool = True

    @property
    def prefix(self) -> str:
        """What the names of its files begin with."""
        return f"{self.number:02d}_{self.name}"


def page(
    title: str, summary: Mapping[str, Any], stages: Sequence[Stage], files: Mapping[str, int],
    hardware: Hardware | None, origins: Sequence[CodeOrigin] = (), about: Mapping[str, str] | None = None,
    ge: Sequence[str] = (),
) -> str:  # fmt: skip
    """`files`: their sizes by name, of the stages and others; `hardware`: whose peaks the overlay of times takes;
    `origins`: of the code; `about`: how the dump was made; `ge`: lines on the budget of GE graphs."""
    memory, flops = summary["memory"], summary["flops"]
    by_op: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in summary["ops"]:
        totals = by_op[row["op"] + (" recomputed" if row["recomputed"] else "")]
        totals[0] += row["count"]
        totals[1] += row["flops"]
    graphs = [name for name in files if name.endswith(".json") and name.count(".") == 1 and name[:2].isdigit()]
    times = f"<code>.time_us.json</code> (at the peaks of {escape(hardware.name)}), " if hardware else ""
    parts = [
        *_origins(origins),
        *_stages(stages, files),
        f"<p>In a browser, layers collapsed: <code>model-explorer {' '.join(map(escape, graphs))}</code>; the files "
        f"{times}<code>.bytes.json</code> (of results), <code>.sent_bytes.json</code> (by collectives) and "
        f"<code>.flop.json</code> colour its nodes (Add per-node data).{MEASURED}</p>",
        *(["<h2>How it was made</h2>", table(("what", ""), about.items())] if about else []),
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


def _stages(stages: Sequence[Stage], files: Mapping[str, int]) -> list[str]:
    """A row for each, and one for the files of none."""
    rows, others = [], dict(files)
    for stage in stages:
        own = [name for name in files if name.startswith(f"{stage.prefix}.")]
        own.sort(key=lambda name: not name.endswith(".txt"))
        what = "" if stage.nodes is None else f"{stage.nodes:,} nodes" if stage.changed else "unchanged"
        rows.append((stage.number, stage.name, what, _links({name: others.pop(name) for name in own})))
    return [
        "<h2>Stages</h2>", table(("", "stage", "graph", "files"), rows),
        "<h2>Other files</h2>", f"<p>{_links(others)}</p>",
    ]  # fmt: skip


def _links(files: Mapping[str, int]) -> str:
    return "<span>" + ", ".join(
        f"<a href='{escape(name)}'>{escape(name)}</a> ({_size(size)})" for name, size in files.items()
    ) + "</span>"  # fmt: skip


def _size(n: int) -> str:
    for size, unit in ((1e6, "MB"), (1e3, "kB")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def _origins(origins: Sequence[CodeOrigin]) -> list[str]:
    rows = [
        (each.key[:12], "hit" if each.from_cache else "miss", each.age, _path(each.file))
        for each in origins
    ]  # fmt: skip
    return ["<h2>Compiled code</h2>", table(("cache key", "cache", "age", "file"), rows)] if rows else []


def _path(file: Path | None) -> str:
    return f"<span class=path>{escape(str(file or ''))}</span>"


def _fusion(lines: Sequence[str]) -> list[str]:
    return ["<h2>Fused, or why not</h2>", table(("where and why",), [[line] for line in lines])] if lines else []
