"""The attempts of a run, from its events.jsonl, and its goodput: what each second from the first start on went to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from llama_fn.run.events import FILE, PARTS

Event = dict[str, Any]


@dataclass
class Attempt:
    """From a start to an end, or to the last word of a process that was killed. `first`: the iteration from which it
    trained, None where it never did; `iteration`: the last one that is known to be done."""

    start: Event
    last_time: float
    first: int | None = None
    steps: int = 0
    iteration: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    saved: list[Event] = field(default_factory=list)
    spikes: list[Event] = field(default_factory=list)
    end: Event | None = None

    @property
    def seconds_per_iteration(self) -> float:
        """Of its steps alone; 0 where none is known."""
        done = self.iteration - (self.first or 0) + self.done_again
        return self.spent.get("step", 0.0) / done if done > 0 else 0.0

    @property
    def done_again(self) -> int:
        """Iterations that it went back over, because of spikes."""
        return sum(each["iteration"] - each["back_to"] for each in self.spikes if "back_to" in each)


def read(workdir: Path) -> list[Attempt]:
    """All of them, the first first; lines that are none of ours are passed over."""
    attempts: list[Attempt] = []
    path = workdir / FILE
    for line in path.read_bytes().splitlines() if path.exists() else ():
        event = _event(line)
        if event is None:
            continue
        if event["event"] == "start":
            attempts.append(Attempt(event, event["time"]))
        elif attempts:
            _add(attempts[-1], event)
    return attempts


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:  # the last word of a killed process
        return None
    known = isinstance(event, dict) and isinstance(event.get("time"), (int, float)) and "event" in event
    return event if known else None


def _add(attempt: Attempt, event: Event) -> None:
    attempt.last_time = event["time"]
    attempt.iteration = max(attempt.iteration, int(event.get("iteration", 0)))
    match event["event"]:
        case "training":
            attempt.first = event["iteration"] if attempt.first is None else min(attempt.first, event["iteration"])
            attempt.steps = event["steps"]
        case "spike":
            attempt.spikes.append(event)
        case "spent":
            attempt.spent = {name: float(event.get(name, 0.0)) for name in PARTS}
        case "saved":
            attempt.saved.append(event)
        case "end":
            attempt.end = event


@dataclass(frozen=True)
class Goodput:
    """`seconds` by part, which together are `wall`: PARTS of events.py; `lost`, steps whose iterations were done again,
    by a later attempt or after a spike; and `idle`, between attempts, or after the last word of a killed one."""

    seconds: dict[str, float]
    wall: float

    @property
    def ratio(self) -> float:
        """The share of steps that counted."""
        return self.seconds["step"] / self.wall if self.wall else 0.0


def goodput(attempts: list[Attempt], now: float | None = None) -> Goodput:
    """Up to the last word of the last attempt, or to `now`."""
    seconds = {**dict.fromkeys(PARTS, 0.0), "lost": 0.0, "idle": 0.0}
    if not attempts:
        return Goodput(seconds, 0.0)
    for attempt in attempts:
        for name, spent in attempt.spent.items():
            seconds[name] += spent
        lost = attempt.done_again * attempt.seconds_per_iteration
        seconds["lost"], seconds["step"] = seconds["lost"] + lost, seconds["step"] - lost
    for attempt, following in pairwise(attempts):
        again = next((a.first for a in attempts[attempts.index(following) :] if a.first is not None), None)
        if again is not None and again < attempt.iteration:
            lost = min((attempt.iteration - again) * attempt.seconds_per_iteration, attempt.spent.get("step", 0.0))
            seconds["lost"] += lost
            seconds["step"] -= lost
    wall = max(attempts[-1].last_time, now or 0.0) - attempts[0].start["time"]
    seconds["idle"] = max(0.0, wall - sum(seconds.values()))
    return Goodput(seconds, wall)
