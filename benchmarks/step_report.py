"""What benchmarks/step.py says of its measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from step_cells import Cell

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-4}  # of the first losses, relative


@dataclass
class Result:
    """Measurements of one cell, by contender: what each said first, its starts (cold and warm, or warm alone) and its
    turns."""

    cell: Cell
    first: dict[str, dict[str, Any]]
    starts: dict[str, list[float]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    ceilings: list[float] = field(default_factory=list)

    def add(self, name: str, answer: dict[str, Any]) -> None:
        """One turn."""
        self.seconds.setdefault(name, []).extend(answer["seconds"])
        self.peaks[name] = answer["peak_bytes"]
        self.ceilings += [answer["ceiling_flops_per_s"]] if "ceiling_flops_per_s" in answer else []

    def median(self, name: str) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds[name])

    def rival(self) -> str | None:
        """The fastest but ours."""
        return min((name for name in self.seconds if name != "ours"), key=self.median, default=None)

    def differing(self) -> dict[str, float]:
        """Contenders whose first losses are not those of the first contender, and the largest relative difference."""
        reference, *_ = (said["results"] for said in self.first.values())
        worst = {
            name: max(abs(a - b) / abs(a) for a, b in zip(reference, said["results"], strict=True))
            for name, said in self.first.items()
        }
        return {name: by for name, by in worst.items() if not by <= TOLERANCE[self.cell.dtype]}

    def fraction_of_ceiling(self) -> float | None:
        """Time that our FLOPs take at the rate of a large matrix product, over our step's."""
        if "ours" not in self.seconds or not self.ceilings:
            return None
        flops: float = self.first["ours"]["flops"]
        return flops / statistics.median(self.ceilings) / self.median("ours")


def text(result: Result) -> str:
    """A line per contender, and the ratios."""
    spec = result.cell.spec()
    tokens = spec["batch"] * spec["seq"]
    lines = [
        "", result.cell.title(),
        f"{'':24}{'step ms':>9}{'fastest':>9}{'slowest':>9}{'tokens/s':>10}{'peak MB':>9}  starts s",
    ]  # fmt: skip
    for name, seconds in result.seconds.items():
        step, low, high = result.median(name), min(seconds), max(seconds)
        starts = ", ".join(f"{s:.1f}" for s in result.starts[name])
        lines.append(
            f"{name:24}{step * 1e3:9.1f}{low * 1e3:9.1f}{high * 1e3:9.1f}{tokens / step:10.0f}"
            f"{result.peaks[name] / 1e6:9.0f}  {starts}"
        )
    losses = next(iter(result.first.values()))["results"]
    lines.append("first losses " + ", ".join(f"{x:.6f}" for x in losses))
    differing = result.differing()
    lines += [f"NOT THE SAME TRAINING: losses of {name} differ by {by:.1e}" for name, by in differing.items()]
    lines += ["the same of every contender"] if not differing else []
    if "ours" in result.seconds and (rival := result.rival()):
        low, high = spread(result, rival)
        lines.append(
            f"speed ours / {rival}, the best rival: {result.median(rival) / result.median('ours'):.3f} "
            f"(by turns {low:.2f} to {high:.2f}); peak memory {result.peaks['ours'] / result.peaks[rival]:.3f}"
        )
    if fraction := result.fraction_of_ceiling():
        ceiling = statistics.median(result.ceilings)
        lines.append(
            f"our {result.first['ours']['flops'] / 1e9:.1f} GFLOP at the {ceiling / 1e9:.0f} GFLOP/s of a product of "
            f"2048 x 2048 x 2048 would take {fraction:.3f} of our step"
        )
    return "\n".join(lines)


def spread(result: Result, rival: str) -> tuple[float, float]:
    """Quartiles of the ratio of steps that followed one another."""
    ratios = [b / a for a, b in zip(result.seconds["ours"], result.seconds[rival], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, high


def markdown(results: Sequence[Result]) -> str:
    """A table, a row per cell: tokens/s of each contender, then the ratios to the fastest rival."""
    names = list(results[0].seconds)
    head = ["cell", *names, "ours / best rival", "peak memory", "of the product ceiling"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for result in results:
        spec = result.cell.spec()
        rates = [f"{spec['batch'] * spec['seq'] / result.median(name):,.0f}" for name in names]
        rival, fraction = result.rival(), result.fraction_of_ceiling()
        ratios = ["", ""]
        if rival and "ours" in names:
            ratios = [
                f"{result.median(rival) / result.median('ours'):.2f}",
                f"{result.peaks['ours'] / result.peaks[rival]:.2f}",
            ]
        rows.append([result.cell.title(), *rates, *ratios, f"{fraction:.2f}" if fraction else ""])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
