"""Pages of HTML without scripts or anything from the network, for whatever a person opens in a browser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #1d2733 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } code { background: #eef2f6; padding: 0 .3em }
table { border-collapse: collapse; font-size: .9em } th { text-align: left; border-bottom: 2px solid #9fb0c0 }
td, th { padding: .15em .9em .15em 0 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
tr + tr td { border-top: 1px solid #e3e9ef } a { color: #0b5cad } a, .path { overflow-wrap: anywhere }
pre { overflow-x: auto }
"""


def document(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML; the title is escaped."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{body}</html>\n"
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
    return f"<div style='overflow-x: auto'><table><tr>{top}</tr>{rest}</table></div>"  # a phone is narrower
