"""What compare_loss found of a run and a reference, and its charts: both values, and the relative errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_fn.errors import UserError

LOSS_CHART, COMPARE_CHART = "loss_chart.png", "compare_chart.png"


@dataclass(frozen=True)
class Comparison:
    """Iterations that a run and the reference have, both their values, and the relative errors."""

    name: str
    iterations: list[int]
    values: list[float]
    references: list[float]

    @property
    def errors(self) -> list[float]:
        """|value - reference| / reference, per iteration."""
        return [abs(a - b) / b for a, b in zip(self.values, self.references, strict=True)]

    @property
    def peak(self) -> float:
        """The largest error."""
        return max(self.errors)

    @property
    def mean(self) -> float:
        """The mean error."""
        return sum(self.errors) / len(self.errors)


def charts(compared: Sequence[Comparison], reference: str, value: str, bound: float, out: Path) -> None:
    """loss_chart.png: `value` of all runs; compare_chart.png: the relative errors and the bound. UserError without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "charts need matplotlib: pip install 'llama_fn[viz]', or leave them out with --nocharts"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    longest = max(compared, key=lambda each: len(each.iterations))
    axes.plot(longest.iterations, longest.references, label=reference, color="tab:gray", linewidth=2.5)
    for each in compared:
        axes.plot(each.iterations, each.values, label=each.name, linewidth=1)
    axes.set(xlabel="iteration", ylabel=value)
    axes.legend()
    _save(figure, out / LOSS_CHART)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for each in compared:
        words = f"{each.name}: peak {each.peak:.4f}, mean {each.mean:.4f}"
        axes.plot(each.iterations, each.errors, linewidth=1, label=words)
    axes.axhline(bound, color="tab:red", linestyle="--", label=f"bound {bound}")
    highest = max(bound, *(each.peak for each in compared))
    axes.set(xlabel="iteration", ylabel="relative error", ylim=(0, highest * 1.25))
    axes.set_title(f"{value} against {reference}", fontsize="medium")
    axes.legend()
    _save(figure, out / COMPARE_CHART)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
