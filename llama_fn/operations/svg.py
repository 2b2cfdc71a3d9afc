"""Charts as SVG inside of a page: lines over iterations, shares of a whole, and bars on a time axis.

Drawn here, since a page is made at the end of every run and the base install has no library that draws. Numbers stand
beside or below what they belong to, never on it; nothing is loaded and nothing runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 180, 52, 24, 10, 12
LARGEST = 640  # pixels that a chart may be wide
POINTS = 500  # of a line: more are means of neighbours
COLORS = ("#0b5cad", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490", "#a16207", "#475569")
Line = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Line], dots: Mapping[str, Line] | None = None, faint: Mapping[str, Line] | None = None
) -> str:
    """Curves over one pair of axes, `dots` beside them and `faint` ones of the same names behind, with a legend below;
    "" where nothing is finite."""
    drawn = {name: _finite(line) for name, line in series.items()}
    marked = {name: _finite(line) for name, line in (dots or {}).items()}
    behind = {name: _finite(line) for name, line in (faint or {}).items()}
    points = [point for line in (*drawn.values(), *marked.values(), *behind.values()) for point in line]
    if not points:
        return ""
    xs = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    ys = _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    parts = [_grid(xs, ys)]
    names = list(dict.fromkeys([*drawn, *marked]))
    for curves, opacity in ((behind, 0.3), (drawn, 1)):
        for name, line in curves.items():
            path = " ".join(f"{xs.at(x):.1f},{ys.at(y):.1f}" for x, y in _thinned(line))
            look = f'stroke="{_color(names, name)}" stroke-width="1.3" opacity="{opacity}"'
            parts.append(f'<polyline points="{path}" fill="none" {look}/>')
    for name, line in marked.items():
        parts += [
            f'<circle cx="{xs.at(x):.1f}" cy="{ys.at(y):.1f}" r="3" fill="{_color(names, name)}"/>' for x, y in line
        ]
    return _svg(HEIGHT, "".join(parts)) + (
        _legend({name: _color(names, name) for name in names}) if len(names) > 1 else ""
    )


def shares(parts: Mapping[str, float], colors: Mapping[str, str]) -> str:
    """One bar of parts that make a whole, and a legend with their shares; parts of nothing are left out."""
    total = sum(parts.values())
    held = {name: value for name, value in parts.items() if value > 0}
    if not total:
        return ""
    x, bar = 0.0, []
    for name, value in held.items():
        width = WIDTH * value / total
        bar.append(f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="16" fill="{colors[name]}"/>')
        x += width
    return _svg(16, "".join(bar)) + _legend(
        {f"{name} {value / total:.1%}": colors[name] for name, value in held.items()}
    )


def spans(rows: Sequence[tuple[str, float, float, str, Sequence[float]]], words: tuple[str, str]) -> str:
    """A row for each (label, begin, end, color, marks) over one time axis, whose ends are called `words`."""
    if not rows:
        return ""
    axis = _Axis([t for _, begin, end, _, marks in rows for t in (begin, end, *marks)], 60, WIDTH - RIGHT, pad=False)
    parts = []
    for i, (label, begin, end, color, marks) in enumerate(rows):
        y = 6 + i * 20
        width = max(axis.at(end) - axis.at(begin), 2)
        parts.append(f'<text x="0" y="{y + 11}">{escape(label)}</text>')
        parts.append(f'<rect x="{axis.at(begin):.1f}" y="{y}" width="{width:.1f}" height="12" fill="{color}"/>')
        parts += [f'<path d="M{axis.at(mark):.1f} {y - 3}v18" stroke="#1d2733"/>' for mark in marks]
    bottom = 6 + len(rows) * 20 + 14
    parts.append(f'<text x="60" y="{bottom}">{escape(words[0])}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{bottom}" text-anchor="end">{escape(words[1])}</text>')
    return _svg(bottom + 6, "".join(parts))


class _Axis:
    """From numbers to places between `first` and `last`."""

    def __init__(self, values: Sequence[float], first: float, last: float, pad: bool = True) -> None:
        self.first, self.last = first, last
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        elif pad and first > last:  # vertical
            room = 0.05 * (self.high - self.low)
            self.low, self.high = self.low - room, self.high + room

    def at(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round numbers, four or five."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(n for n in (1, 2, 5, 10) if (self.high - self.low) / (step * n) <= 5)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _grid(xs: _Axis, ys: _Axis) -> str:
    parts = []
    for tick in ys.ticks():
        y = ys.at(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e3e9ef"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in xs.ticks():
        parts.append(f'<text x="{xs.at(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_number(tick)}</text>')
    return "".join(parts)


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(line: Line) -> list[tuple[float, float]]:
    return [(x, y) for x, y in line if math.isfinite(y)]


def _thinned(line: Line) -> Line:
    size = max(1, -(-len(line) // POINTS))
    groups = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _color(names: Sequence[str], name: str) -> str:
    return COLORS[names.index(name) % len(COLORS)]


def _legend(colors: Mapping[str, str]) -> str:
    marks = (f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in colors.items())
    return f"<p class=legend>{''.join(marks)}</p>"


def _svg(height: float, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" style="width:100%;max-width:{LARGEST}px" font-size="10" '
        f'font-family="system-ui, sans-serif" fill="#475569">{body}</svg>'
    )
