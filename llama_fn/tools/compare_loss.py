"""Compare runs with a reference: same iterations, relative error, two charts, and a bound that must hold.

    python -m llama_fn.tools.compare_loss RUN REFERENCE --out=docs/images
    python -m llama_fn.tools.compare_loss RUN RUN RUN REFERENCE --value=grad_norm --smooth=0.9

Each is a work folder, or a metrics.jsonl file; the last is the reference. For every iteration that a run and the
reference both logged, the relative error is |value - reference| / reference. --smooth compares exponential means
instead, which tells a drift from the noise of single iterations. Prints a line per --every iterations, the peak and the
mean; writes loss_chart.png and compare_chart.png. Exit status 0 where all peaks are below --bound, 1 where one is not,
2 for wrong input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.files import check_writable
from llama_fn.run import records
from llama_fn.tools import command
from llama_fn.tools.compare_charts import COMPARE_CHART, LOSS_CHART, Comparison, charts

FLAGS = flags.FLAGS
VALUES = ("lm_loss", "grad_norm")


def read_values(path: Path, value: str = "lm_loss", smooth: float = 0.0) -> dict[int, float]:
    """Iteration -> value of a run, smoothed with the weight `smooth`; UserError for one that is not finite and
    positive."""
    known = {}
    for row in records.read(path):
        number = row.get(value)
        if not isinstance(number, (int, float)) or not math.isfinite(number) or number <= 0:
            raise UserError(
                f"{path}: {value} of iteration {row['iteration']} is {number}; a relative error needs a positive one"
            )
        known[row["iteration"]] = float(number)
    return records.smoothed(known, smooth)


def compare(values: Mapping[int, float], references: Mapping[int, float], name: str = "run") -> Comparison:
    """Both values at the iterations that both runs logged; UserError where there are none."""
    both = sorted(set(values) & set(references))
    if not both:
        raise UserError(f"{name} and the reference logged no iteration in common; compare runs of the same "
                        "--run.log_every")  # fmt: skip
    return Comparison(name, both, [values[i] for i in both], [references[i] for i in both])


def report(comparison: Comparison, every: int, bound: float) -> str:
    """A line per `every` iterations and the last, then the verdict."""
    lines = [f"{'iteration':>9}  {comparison.name[:12]:>12}  {'reference':>12}  {'relative error':>14}"]
    rows = list(zip(comparison.iterations, comparison.values, comparison.references, comparison.errors, strict=True))
    for n, (i, a, b, error) in enumerate(rows):
        if n % every == 0 or n == len(rows) - 1:
            lines.append(f"{i:9d}  {a:12.6f}  {b:12.6f}  {error:14.6f}")
    worst = comparison.iterations[comparison.errors.index(comparison.peak)]
    verdict = "below" if comparison.peak < bound else "NOT below"
    lines.append(
        f"{comparison.name}, {len(rows)} iterations: peak relative error {comparison.peak:.6f} at iteration {worst}, "
        f"mean {comparison.mean:.6f}; {verdict} the bound {bound}"
    )
    return "\n".join(lines)


def names_of(paths: Sequence[Path], given: Sequence[str]) -> list[str]:
    """One for each path: those given, or the folders' names, numbered where two are alike."""
    if given and len(given) != len(paths):
        raise UserError(f"--names={','.join(given)}: give {len(paths)} names, one for each run, such as npu,gpu")
    names = list(given) or [path.name if path.is_dir() else path.absolute().parent.name for path in paths]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def compare_runs(argv: list[str]) -> int:
    """Print the comparisons and draw their charts; the exit status."""
    paths = [Path(arg) for arg in argv[1:]]
    if len(paths) < 2:
        raise UserError("at least two runs are compared: compare_loss RUN [RUN ...] REFERENCE (see --help)")
    if not math.isfinite(FLAGS.bound):
        raise UserError(f"--bound={FLAGS.bound} is no bound; give a number such as 0.02")
    names, out = names_of(paths, FLAGS.names), Path(FLAGS.out)
    if FLAGS.charts:
        check_writable(out / LOSS_CHART)
    *runs, references = [read_values(path, FLAGS.value, FLAGS.smooth) for path in paths]
    compared = [compare(values, references, name) for values, name in zip(runs, names[:-1], strict=True)]
    print("\n\n".join(report(each, FLAGS.every, FLAGS.bound) for each in compared))
    if FLAGS.charts:
        words = f"{FLAGS.value}{f', smoothed with {FLAGS.smooth:g}' if FLAGS.smooth else ''}"
        charts(compared, names[-1], words, FLAGS.bound, out)
        print(f"charts: {out / LOSS_CHART}, {out / COMPARE_CHART}")
    return 0 if all(each.peak < FLAGS.bound for each in compared) else 1


def main(argv: list[str]) -> None:
    """The command: exit status 0, 1 or 2."""
    sys.exit(command.status_of(lambda: compare_runs(argv)))


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_float("bound", 0.02, "largest relative error allowed, at every iteration", lower_bound=0.0)
    flags.DEFINE_enum("value", "lm_loss", VALUES, "what is compared")
    flags.DEFINE_float(
        "smooth", 0.0, "weight of an exponential mean's past, such as 0.9; 0: iterations as they are", 0.0, 0.9999
    )
    flags.DEFINE_integer("every", 10, "iterations between printed lines", lower_bound=1)
    flags.DEFINE_string("out", ".", "folder for the charts")
    flags.DEFINE_bool("charts", True, "draw the charts")
    flags.DEFINE_list("names", [], "what the charts call the runs, the reference last; empty: as their folders")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.parse)
