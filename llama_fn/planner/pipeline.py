"""When each piece of work of a pipeline schedule runs, from what it takes and what it waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sharding.schedules import BACKWARD, FORWARD, WEIGHT, Order, Work

Key = tuple[str, int, int]  # kind, microbatch, and part of the model: chunk * stages + stage


@dataclass(frozen=True)
class Event:
    """A piece of work and when it runs, in seconds from the beginning of the step."""

    work: Work
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """Events of every stage, in order."""

    stages: tuple[tuple[Event, ...], ...]

    @property
    def step_s(self) -> float:
        """Until the last stage has done its last work."""
        return max(event.end_s for events in self.stages for event in events)

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Of each stage, what of the step it does not work."""
        return tuple(self.step_s - sum(event.end_s - event.begin_s for event in events) for events in self.stages)

    @property
    def bubble(self) -> float:
        """The share of the step in which stages are idle, the mean over them."""
        return sum(self.idle_s) / len(self.stages) / self.step_s

    def picture(self, unit_s: float = 1.0) -> str:
        """A line per stage and a column per unit, as in sharding/schedules.py."""
        lines = []
        for events in self.stages:
            line = ["."] * round(self.step_s / unit_s)
            for event in events:
                for column in range(round(event.begin_s / unit_s), round(event.end_s / unit_s)):
                    line[column] = _letter(event.work)
            lines.append("".join(line))
        return "\n".join(lines)


def simulate(order: Order, seconds: Callable[[int, Work], float], message_s: float = 0.0) -> Timeline:
    """The timeline of a schedule's work: `seconds(stage, work)` is what it takes, `message_s` a message between stages.

    A stage works in its order and waits for what it needs. ValueError where stages wait for one another, or for work
    that nobody does, naming what each waits for.
    """
    parts = parts_of(order)
    done: dict[Key, tuple[int, float]] = {}  # by whom, and when
    events: list[list[Event]] = [[] for _ in order]
    moved = True
    while moved:
        moved = False
        for stage, works in enumerate(order):
            while len(events[stage]) < len(works):
                work = works[len(events[stage])]
                part = work.chunk * len(order) + stage
                waits = needs(work, part, parts)
                if any(need not in done for need in waits):
                    break
                ready = [end + message_s * (source != stage) for source, end in map(done.__getitem__, waits)]
                begin = max([*ready, events[stage][-1].end_s if events[stage] else 0.0])
                event = Event(work, begin, begin + seconds(stage, work))
                events[stage].append(event)
                done[work.kind, work.microbatch, part] = stage, event.end_s
                moved = True
    _refuse_stuck(order, events)
    return Timeline(tuple(map(tuple, events)))


def stashes(order: Order) -> tuple[int, ...]:
    """Of each stage, how many microbatches' activations (of one chunk) it keeps at most: from the forward to the last
    work that reads them."""
    most = []
    for works in order:
        last = WEIGHT if any(work.kind == WEIGHT for work in works) else BACKWARD
        kept, peak = 0, 0
        for work in works:
            kept += (work.kind == FORWARD) - (work.kind == last)
            peak = max(peak, kept)
        most.append(peak)
    return tuple(most)


def parts_of(order: Order) -> int:
    """Into how many parts the model is cut."""
    return len(order) * (1 + max(work.chunk for works in order for work in works))


def needs(work: Work, part: int, parts: int) -> list[Key]:
    """What must be done before, by kind, microbatch and part."""
    if work.kind == FORWARD:
        return [(FORWARD, work.microbatch, part - 1)] if part else []
    if work.kind == WEIGHT:
        return [(BACKWARD, work.microbatch, part)]
    behind = [(BACKWARD, work.microbatch, part + 1)] if part + 1 < parts else []
    return [(FORWARD, work.microbatch, part), *behind]


def _refuse_stuck(order: Order, events: list[list[Event]]) -> None:
    stuck = [(stage, works[len(events[stage])]) for stage, works in enumerate(order) if len(events[stage]) < len(works)]
    if stuck:
        waiting = "; ".join(
            f"stage {stage} at the {work.kind} of microbatch {work.microbatch}, chunk {work.chunk}"
            for stage, work in stuck
        )
        raise ValueError(f"this schedule never ends: {waiting} wait for what is not done before")


def _letter(work: Work) -> str:
    first = {FORWARD: "0", BACKWARD: "a", WEIGHT: "A"}[work.kind]
    return chr(ord(first) + work.microbatch % (10 if work.kind == FORWARD else 26))
