"""How a run is, judged from its work folder alone: alive, moving, finished, failed, or getting worse."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path

from llama_fn.errors import UserError
from llama_fn.operations import attempts
from llama_fn.run import records
from llama_fn.run.workdir_lock import holder
from llama_fn.signals import SAVED, UNSAVED

RECENT = 50  # records whose median step counts
SMOOTHED = 20  # records that a loss is a mean of
LOST_RANK = 3  # exit status where another process is at fault (distributed/watchdog.py, which imports torch)
LEAST_S = 60.0  # a run that logs often is not stuck sooner


class Condition(Enum):
    """What may be found."""

    RUNNING = "running"
    PREPARING = "preparing"
    STUCK = "running but not progressing"
    DIVERGING = "running and diverging"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    DIED = "died"
    NEVER = "never started"


@dataclass(frozen=True)
class State:
    """`since`: when its newest attempt began, seconds since 1970; `words`: what is known, for a person."""

    condition: Condition
    words: str
    since: float = 0.0
    pid: int = 0
    host: str = ""
    iteration: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Limits:
    """`stuck`: how many times the median time between two records; `prepare_s`: for all that comes before the first
    step; `worse`: nats that the smoothed loss may lie above the best it had."""

    stuck: float = 10.0
    prepare_s: float = 3600.0
    worse: float = 1.0


def look(workdir: Path, limits: Limits = Limits(), now: float | None = None) -> State:
    """The state of the run in `workdir`."""
    return judged(workdir, attempts.read(workdir), _rows(workdir), limits, now)


class Watcher:
    """Looks at one run again and again. What is news to it is as old as the time since then by a clock that nobody
    sets: a run is not stuck because the time of day jumped."""

    def __init__(self, workdir: Path, limits: Limits = Limits()) -> None:
        self.workdir, self.limits = workdir, limits
        self.stamps: tuple[float, ...] = ()
        self.behind = 0.0  # what the run's stamps are ahead of the monotonic clock

    def look(self) -> State:
        """The state of the run."""
        tried = attempts.read(self.workdir)
        stamps = _changed(self.workdir / "metrics.jsonl"), tried[-1].last_time if tried else 0.0
        if stamps != self.stamps:
            self.behind = (max(stamps) if self.stamps else time.time()) - time.monotonic()
            self.stamps = stamps
        return judged(self.workdir, tried, _rows(self.workdir), self.limits, time.monotonic() + self.behind)


def judged(
    workdir: Path, tried: list[attempts.Attempt], rows: list[records.Record], limits: Limits = Limits(),
    now: float | None = None,
) -> State:  # fmt: skip
    """The same, of attempts and records that were read already."""
    now = time.time() if now is None else now
    if not tried:
        return State(Condition.NEVER, f"{workdir} has no run" if workdir.is_dir() else f"{workdir} does not exist")
    last = tried[-1]
    iteration = max(rows[-1]["iteration"] if rows else 0, last.iteration)
    steps = last.steps or int(last.start.get("steps", 0))
    common = {
        "since": last.start["time"], "pid": int(last.start["pid"]), "host": str(last.start["host"]),
        "iteration": iteration, "steps": steps,
    }  # fmt: skip
    if last.end is None and holder(workdir) is not None:
        return State(*_alive(workdir, last, rows, limits, now), **common)
    return State(*_over(last, iteration, steps), **common)


def _rows(workdir: Path) -> list[records.Record]:
    try:
        return records.read(workdir)
    except UserError:  # none yet, or its last line is being written
        return []


def _alive(
    workdir: Path, last: attempts.Attempt, rows: list[records.Record], limits: Limits, now: float
) -> tuple[Condition, str]:
    if last.first is None:
        waited = now - last.last_time
        if waited > limits.prepare_s:
            return Condition.STUCK, f"no step after {duration(waited)} of preparing and compiling"
        return Condition.PREPARING, f"preparing and compiling for {duration(now - last.start['time'])}"
    apart = _seconds_between(rows)
    quiet = now - max(_changed(workdir / "metrics.jsonl"), last.last_time)
    limit = max(limits.stuck * apart, LEAST_S) if apart else limits.prepare_s
    moving = f"iteration {rows[-1]['iteration'] if rows else last.first} of {last.steps}"
    if quiet > limit:
        often = f"; a record comes every {apart:.1f} s" if apart else ""
        return Condition.STUCK, f"no new iteration for {duration(quiet)} after {moving}{often}"
    if bad := _worse(rows, limits.worse):
        return Condition.DIVERGING, f"{moving}; {bad}"
    loss = f", loss {rows[-1]['lm_loss']:.4f}" if rows else ""
    return Condition.RUNNING, f"{moving}{loss}"


def _over(last: attempts.Attempt, iteration: int, steps: int) -> tuple[Condition, str]:
    if last.end is None:
        return Condition.DIED, f"its process is gone without a word, at or after iteration {iteration} of {steps}"
    status, why = last.end["status"], last.end["why"]
    if status == 0:
        return Condition.FINISHED, f"{iteration} iterations done"
    if status in (SAVED, UNSAVED):
        return Condition.STOPPED, why
    if status == LOST_RANK:
        return Condition.DIED, why
    return Condition.FAILED, f"status {status}: {why}"


def _seconds_between(rows: list[records.Record]) -> float:
    """Median time from one record to the next; 0 where too few are there."""
    recent = rows[-RECENT:]
    if len(recent) < 2:
        return 0.0
    gaps = [b["iteration"] - a["iteration"] for a, b in pairwise(recent)]
    return statistics.median(row["step_time_ms"] / 1e3 for row in recent[1:]) * statistics.median(gaps)


def _worse(rows: list[records.Record], limit: float) -> str:
    """What is wrong with the losses; "" for nothing."""
    losses = [row["lm_loss"] for row in rows]
    if len(losses) >= 3 and not any(math.isfinite(loss) for loss in losses[-3:]):
        return "the last losses are not finite"
    finite = [loss for loss in losses if math.isfinite(loss)]
    means = [statistics.fmean(finite[i : i + SMOOTHED]) for i in range(0, len(finite) - SMOOTHED + 1, SMOOTHED // 2)]
    if means and means[-1] > min(means) + limit:
        return f"the loss is {means[-1]:.3f}, and was {min(means):.3f}"
    return ""


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def duration(seconds: float) -> str:
    """As squeue writes it: D-HH:MM:SS, hours without days, minutes without hours."""
    whole = max(0, int(seconds))
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
