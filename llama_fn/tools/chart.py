"""The losses of one or several runs as a chart: in the terminal, and as an image.

    python -m llama_fn.tools.chart work/tiny_cpu
    python -m llama_fn.tools.chart work/a work/b --png=losses.png --smooth=0.95

Each run is a work folder or its metrics.jsonl. Validation losses are dots; losses that were not finite are left out.
The image is loss.png in the first work folder unless --png says otherwise. Needs the extra viz (plotext, matplotlib).

Exit status 0, or 2 for wrong input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.files import check_writable
from llama_fn.run import records
from llama_fn.tools import command

FLAGS = flags.FLAGS
COLORS = ("red", "blue", "green", "orange", "magenta", "cyan")


@dataclass(frozen=True)
class Curve:
    """A run's losses by iteration, smoothed, and its validation losses."""

    name: str
    losses: dict[int, float]
    validation: dict[int, float]


def read(path: Path, smooth: float) -> Curve:
    """A run's curve; UserError where there is none."""
    rows = records.read(path)
    losses = {row["iteration"]: row["lm_loss"] for row in rows if math.isfinite(row["lm_loss"])}
    if not losses:
        raise UserError(f"{path} has no iteration with a finite loss yet")
    validation = {row["iteration"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    name = (path if path.is_dir() else path.parent).name
    return Curve(
        name, records.smoothed(losses, smooth), {i: loss for i, loss in validation.items() if math.isfinite(loss)}
    )


def in_terminal(curves: Sequence[Curve], width: int, height: int) -> str:
    """The chart as text."""
    plot = _library("plotext")
    plot.clear_figure()
    plot.plot_size(width, height)
    plot.theme("clear")
    for curve, color in zip(curves, COLORS, strict=False):
        plot.plot([*curve.losses], [*curve.losses.values()], label=curve.name, color=color, marker="braille")
        if curve.validation:
            label = f"{curve.name}, validation"
            plot.scatter([*curve.validation], [*curve.validation.values()], label=label, color=color, marker="●")
    plot.xlabel("iteration")
    plot.ylabel("loss, nats per token")
    text = plot.build()
    return str(text if sys.stdout.isatty() else plot.uncolorize(text))


def as_image(curves: Sequence[Curve], path: Path) -> None:
    """The chart as a PNG."""
    matplotlib = _library("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for curve in curves:
        (line,) = axes.plot([*curve.losses], [*curve.losses.values()], label=curve.name, linewidth=1)
        if curve.validation:
            label = f"{curve.name}, validation"
            at, losses = [*curve.validation], [*curve.validation.values()]
            axes.plot(at, losses, "o", label=label, color=line.get_color())
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"charts need {name}: pip install 'llama_fn[viz]'") from None


def chart(argv: list[str]) -> int:
    """Print and write what the flags ask for."""
    paths = [Path(each).expanduser() for each in argv[1:]]
    if not 1 <= len(paths) <= len(COLORS):
        raise UserError(f"name one to {len(COLORS)} work folders: python -m llama_fn.tools.chart work/tiny_cpu")
    curves = [read(path, FLAGS.smooth) for path in paths]
    beside = paths[0] if paths[0].is_dir() else paths[0].parent
    png = Path(FLAGS.png).expanduser() if FLAGS.png else beside / "loss.png"
    check_writable(png)
    print(in_terminal(curves, FLAGS.width, FLAGS.height))
    as_image(curves, png)
    print(f"chart: {png}")
    return 0


def main(argv: list[str]) -> None:
    """The command: exit status 0 or 2."""
    sys.exit(command.status_of(lambda: chart(argv)))


if __name__ == "__main__":
    flags.DEFINE_string("png", "", "image to write; unless given, loss.png in the first work folder")
    flags.DEFINE_float("smooth", 0.0, "weight of the earlier iterations in a mean; 0: none, 0.95: much", 0.0, 0.9999)
    flags.DEFINE_integer("width", 100, "columns of the chart in the terminal", 20)
    flags.DEFINE_integer("height", 24, "its lines", 8)
    app.run(main, flags_parser=command.parse)
