"""One line that says how a run is, in the grammar of BigScience's slurm-status.py, and whether somebody must look.

[2026-11-27 22:00:01] PULSE: 65b is running for 1-10:59:00 since 2026-11-26 11:01:01 (1165978 on 'npu' partition
    (n[01-12]); iteration 1200 of 50000, loss 2.4310
[2026-11-27 22:00:01] PULSE: 65b is scheduled to start in 2:10:00 (at 2026-11-28 00:10:01) (...)
[2026-11-27 22:00:01] PULSE: 65b is waiting to be scheduled (1165978 on 'npu' partition (Priority)
[2026-11-27 22:00:01] ***ALERT: 65b is not RUNNING or SCHEDULED! its process is gone without a word ...
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llama_fn.operations.schedulers import SCHEDULERS, Job, until
from llama_fn.operations.state import Condition, Limits, State, duration, look

# Exit statuses of pulse by what it found; 0 is well, 2 is wrong input as everywhere.
STUCK, FAILED, DIVERGING, GONE, WAITING = 11, 12, 13, 14, 15
_STATUS = {Condition.STUCK: STUCK, Condition.FAILED: FAILED, Condition.DIVERGING: DIVERGING}
_ALIVE = (Condition.RUNNING, Condition.PREPARING, Condition.STUCK, Condition.DIVERGING)


@dataclass(frozen=True)
class Pulse:
    """The line without its time, and the status: 0 where nobody need look."""

    text: str
    status: int

    def line(self, now: float | None = None) -> str:
        """With the time, and what kind of line it is."""
        kind = "***ALERT" if self.status else "PULSE"
        return f"[{_written(time.time() if now is None else now)}] {kind}: {self.text}"


def take(workdir: Path, name: str, scheduler: str, limits: Limits, wait_s: float) -> Pulse:
    """How the run in `workdir` is, which `scheduler` knows as `name`: a key of SCHEDULERS, "process" for a run on this
    machine, or "none" for the files alone. A job that waits longer than `wait_s` is worth a look. UserError where the
    scheduler does not answer."""
    state = look(workdir, limits)
    if scheduler not in SCHEDULERS:
        return _alone(name, state)
    jobs = SCHEDULERS[scheduler](name)
    running = [job for job in jobs if job.running]
    if running:
        return _running(name, state, running[0])
    return _scheduled(name, jobs[0], wait_s) if jobs else _alone(name, state)


def _running(name: str, state: State, job: Job) -> Pulse:
    """The scheduler says that it runs: what do its files say?"""
    began = job.since or state.since
    running = f"{name} is running for {duration(time.time() - began)} since {_written(began)} {_place(job)}"
    if state.condition in (Condition.RUNNING, Condition.PREPARING):
        return Pulse(f"{running}; {state.words}", 0)
    if state.condition in (Condition.STUCK, Condition.DIVERGING):
        return Pulse(f"{name} is {state.condition.value}! {state.words}; {running}", _STATUS[state.condition])
    if state.since < job.since or not state.since:  # the files are of an attempt before
        return Pulse(f"{running}; its start has written nothing yet", 0)
    return Pulse(f"{name} holds its devices and does not train! {state.words}; {running}", STUCK)


def _scheduled(name: str, job: Job, wait_s: float) -> Pulse:
    waited = time.time() - job.since if job.since else 0.0
    if waited > wait_s:
        return Pulse(f"{name} is scheduled but not running for {duration(waited)}! {_place(job)}", WAITING)
    if job.starts:
        when = f"in {duration(until(job.starts))} (at {_written(job.starts)})"
        return Pulse(f"{name} is scheduled to start {when} {_place(job)}", 0)
    return Pulse(f"{name} is waiting to be scheduled {_place(job)}", 0)


def _alone(name: str, state: State) -> Pulse:
    """No scheduler knows it, or none is asked."""
    if state.condition is Condition.FINISHED:
        return Pulse(f"{name} has finished: {state.words}", 0)
    if state.condition in _ALIVE:
        since = f"{duration(time.time() - state.since)} since {_written(state.since)}"
        running = f"{name} is running for {since} ({state.pid} on '{state.host}'"
        if state.condition in _STATUS:
            return Pulse(f"{name} is {state.condition.value}! {state.words}; {running}", _STATUS[state.condition])
        return Pulse(f"{running}; {state.words}", 0)
    if state.condition is Condition.FAILED:
        return Pulse(f"{name} is not RUNNING or SCHEDULED! it failed with {state.words}", FAILED)
    return Pulse(f"{name} is not RUNNING or SCHEDULED! {state.words}", GONE)


def _place(job: Job) -> str:
    return f"({job.id} on '{job.where}' partition ({job.notes})"


def _written(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")
