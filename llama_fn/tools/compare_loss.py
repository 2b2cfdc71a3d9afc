"""Compare the losses of two runs: same iterations, relative error, two charts, and a bound that must hold.

    python -m llama_fn.tools.compare_loss RUN REFERENCE --out=docs/images

RUN and REFERENCE are work folders, or metrics.jsonl files. For every iteration that both logged, the relative error is
|loss - reference| / reference. Prints a line per --every iterations, the peak and the mean; writes loss_chart.png and
compare_chart.png. Exit status 0 where the peak is below --bound, 1 where it is not, 2 for wrong input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.files import check_writable
from llama_fn.run import records
from llama_fn.tools import command

FLAGS = flags.FLAGS
LOSS_CHART, COMPARE_CHART = "loss_chart.png", "compare_chart.png"


@dataclass(frozen=True)
class Comparison:
    """Iterations that both runs have, both losses, and their relative errors."""

    iterations: list[int]
    losses: list[float]
    references: list[float]

    @property
    def errors(self) -> list[float]:
        """|loss - reference| / reference, per iteration."""
        return [abs(a - b) / b for a, b in zip(self.losses, self.references, strict=True)]

    @property
    def peak(self) -> float:
        """The largest error."""
        return max(self.errors)

    @property
    def mean(self) -> float:
        """The mean error."""
        return sum(self.errors) / len(self.errors)


def read_losses(path: Path) -> dict[int, float]:
    """Iteration -> lm_loss of a run; UserError for one that is not finite and positive."""
    losses = records.losses(path)
    bad = [i for i, loss in losses.items() if not math.isfinite(loss) or loss <= 0]
    if bad:
        raise UserError(
            f"{path}: the loss of iteration {bad[0]} is {losses[bad[0]]}; a relative error needs a positive one"
        )
    return losses


def compare(losses: Mapping[int, float], references: Mapping[int, float]) -> Comparison:
    """Both losses at the iterations that both runs logged; UserError where there are none."""
    both = sorted(set(losses) & set(references))
    if not both:
        raise UserError("the two runs logged no iteration in common; compare runs of the same --run.log_every")
    return Comparison(both, [losses[i] for i in both], [references[i] for i in both])


def charts(comparison: Comparison, names: tuple[str, str], bound: float, out: Path) -> None:
    """loss_chart.png: both losses; compare_chart.png: the relative error and the bound."""
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
    axes.plot(comparison.iterations, comparison.references, label=names[1], color="tab:gray", linewidth=2.5)
    axes.plot(comparison.iterations, comparison.losses, label=names[0], color="tab:red", linewidth=1)
    axes.set(xlabel="iteration", ylabel="lm loss (nats per token)")
    axes.legend()
    figure.savefig(out / LOSS_CHART, dpi=120)
    pyplot.close(figure)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        comparison.iterations,
        comparison.errors,
        color="tab:blue",
        linewidth=1,
        label=f"peak {comparison.peak:.4f}, mean {comparison.mean:.4f}",
    )
    axes.axhline(bound, color="tab:red", linestyle="--", label=f"bound {bound}")
    axes.set(xlabel="iteration", ylabel="relative error of the loss", ylim=(0, max(bound, comparison.peak) * 1.25))
    axes.set_title(f"{names[0]} against {names[1]}", fontsize="medium")
    axes.legend()
    figure.savefig(out / COMPARE_CHART, dpi=120)
    pyplot.close(figure)


def report(comparison: Comparison, every: int, bound: float) -> str:
    """A line per `every` iterations and the last, then the verdict."""
    lines = [f"{'iteration':>9}  {'loss':>12}  {'reference':>12}  {'relative error':>14}"]
    rows = list(zip(comparison.iterations, comparison.losses, comparison.references, comparison.errors, strict=True))
    for n, (i, a, b, error) in enumerate(rows):
        if n % every == 0 or n == len(rows) - 1:
            lines.append(f"{i:9d}  {a:12.6f}  {b:12.6f}  {error:14.6f}")
    worst = comparison.iterations[comparison.errors.index(comparison.peak)]
    verdict = "below" if comparison.peak < bound else "NOT below"
    lines.append(
        f"{len(rows)} iterations: peak relative error {comparison.peak:.6f} at iteration {worst}, "
        f"mean {comparison.mean:.6f}; {verdict} the bound {bound}"
    )
    return "\n".join(lines)


def compare_runs(argv: list[str]) -> int:
    """Print the comparison and draw its charts; the exit status."""
    if len(argv) != 3:
        raise UserError("two runs are compared: compare_loss RUN REFERENCE (see --help)")
    if len(FLAGS.names) != 2:
        raise UserError(f"--names={','.join(FLAGS.names)}: give two names, such as npu,gpu")
    if not math.isfinite(FLAGS.bound):
        raise UserError(f"--bound={FLAGS.bound} is no bound; give a number such as 0.02")
    a, b, out = Path(argv[1]), Path(argv[2]), Path(FLAGS.out)
    if FLAGS.charts:
        check_writable(out / LOSS_CHART)
    comparison = compare(read_losses(a), read_losses(b))
    print(report(comparison, FLAGS.every, FLAGS.bound))
    if FLAGS.charts:
        charts(comparison, (FLAGS.names[0], FLAGS.names[1]), FLAGS.bound, out)
        print(f"charts: {out / LOSS_CHART}, {out / COMPARE_CHART}")
    return 0 if comparison.peak < FLAGS.bound else 1


def main(argv: list[str]) -> None:
    """The command: exit status 0, 1 or 2."""
    sys.exit(command.status_of(lambda: compare_runs(argv)))


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_float("bound", 0.02, "largest relative error allowed, at every iteration", lower_bound=0.0)
    flags.DEFINE_integer("every", 10, "iterations between printed lines", lower_bound=1)
    flags.DEFINE_string("out", ".", "folder for the charts")
    flags.DEFINE_bool("charts", True, "draw the charts")
    flags.DEFINE_list("names", ["run", "reference"], "what the charts call the two")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.parse)
