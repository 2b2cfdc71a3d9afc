"""The end of a run in a few lines: what came of it, where its time went, and what to do next. summary.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from llama_fn.files import atomic
from llama_fn.operations.facts import Facts
from llama_fn.operations.state import Condition, duration

FILE = "summary.md"


def write(facts: Facts) -> str:
    """Write summary.md of a run; returns it."""
    text = as_text(facts)
    with atomic(facts.folder / FILE) as file:
        file.write(text)
    return text


def as_text(facts: Facts) -> str:
    """Markdown."""
    return "\n".join([f"# {facts.name}: {facts.state.condition.value}", "", *_lines(facts), ""])


def _lines(facts: Facts) -> Iterator[str]:
    yield f"- {facts.state.words}, iteration {facts.state.iteration} of {facts.state.steps}"
    if line := facts.smoothed():
        yield f"- loss, smoothed: {line[0][1]:.4f} at first, {line[-1][1]:.4f} now"
    validated = [row for row in facts.rows if "validation_loss" in row]
    if validated:
        last, best = validated[-1], min(validated, key=lambda row: row["validation_loss"])
        each = ", ".join(f"{k.partition('/')[2]} {v:.4f}" for k, v in last.items() if k.startswith("validation_loss/"))
        yield (
            f"- validation: {last['validation_loss']:.4f} at iteration {last['iteration']}"
            + (f" ({each})" if each else "")
            + f"; the best was {best['validation_loss']:.4f} at {best['iteration']}"
        )
    speeds = [value for _, value in facts.series("tokens_per_second")]
    if speeds:
        yield (
            f"- {statistics.median(speeds):,.0f} tokens/s in a step, {facts.tokens_per_second:,.0f} over all of the "
            f"time since the first start"
        )
    yield f"- {duration(facts.goodput.wall)} since the first start, in {_starts(facts)}: {_parts(facts)}"
    yield f"- checkpoints: {', '.join(map(str, facts.checkpoints)) or 'none'}"
    yield f"- next: {_next(facts)}"


def _starts(facts: Facts) -> str:
    return f"{len(facts.attempts)} start{'s' if len(facts.attempts) > 1 else ''}"


def _parts(facts: Facts) -> str:
    wall = facts.goodput.wall or 1.0
    held = sorted(facts.goodput.seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / wall:.1%}" for name, value in held if value / wall >= 0.0005)


def _next(facts: Facts) -> str:
    folder = facts.folder
    match facts.state.condition:
        case Condition.FINISHED:
            return f"`python -m llama_fn.tools.generate --source={folder} --prompt=...`, or more --run.steps"
        case Condition.FAILED if "status 2" in facts.state.words:
            return "mend what the error names, and start the same command again"
        case Condition.FAILED if "status 4" in facts.state.words:
            return "go on from the last checkpoint with another --optim.lr or other data (docs/stopping.md)"
        case _:
            return "start the same command again"
