"""What a person sees while a run goes on: what it is at and a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llama_fn import progress

log = logging.getLogger("llama_fn.display")
MEAN_OF = 50  # records whose mean loss the bar shows


def terminal() -> Any:
    """rich's console for standard error where that is a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def at_work(console: Any, what: str) -> Iterator[None]:
    """On a terminal `what` is done until the block ends: the time that it takes so far, and, once the work says how far
    it is (llama_fn/progress.py), a bar."""
    if console is None:
        yield
        return
    from rich import progress as bars

    columns = bars.BarColumn(20), bars.TimeElapsedColumn(), bars.TextColumn("{task.description}")
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def show(done: float, inner: str) -> None:
            done = max(done, bar.tasks[0].completed)  # work that is done again, by another way, is no step back
            bar.update(task, completed=done, total=1.0, description=": ".join(filter(None, (what, inner))))

        with progress.shown_by(show):
            yield


class Display:
    """`console` is rich's on a terminal, None elsewhere."""

    def __init__(self, steps: int, start: int, console: Any) -> None:
        self.losses: deque[float] = deque(maxlen=MEAN_OF)
        self.progress: Any = None
        if console is not None:
            from rich import progress as bars

            self.progress = bars.Progress(
                bars.TextColumn("step {task.completed}/{task.total}"), bars.BarColumn(),
                bars.TimeRemainingColumn(), bars.TextColumn("{task.description}"), console=console,
            )  # fmt: skip
            self.task = self.progress.add_task("", total=steps, completed=start)

    def start(self) -> None:
        """Show the progress bar, on a terminal."""
        if self.progress:
            self.progress.start()

    def record(self, row: Mapping[str, Any], text: str) -> None:
        """Show an iteration: its metrics in the bar, or its log line where there is none."""
        if self.progress:
            if math.isfinite(row["lm_loss"]):
                self.losses.append(row["lm_loss"])
            mean = statistics.fmean(self.losses or [math.nan])
            summary = (
                f"loss {row['lm_loss']:.4f} (mean of {len(self.losses)}: {mean:.4f})  norm {row['grad_norm']:.3f}  "
                f"{row['tokens_per_second']:.0f} tokens/s  lr {row['learning_rate']:.2e}"
            )
            self.progress.update(self.task, completed=row["iteration"], description=summary)
        else:
            log.info("%s", text)

    def close(self) -> None:
        """Take the bar away."""
        if self.progress:
            self.progress.stop()
