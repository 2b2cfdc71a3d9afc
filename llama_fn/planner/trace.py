"""The simulated step of a pipeline as a trace, for https://ui.perfetto.dev or chrome://tracing.

A process is a stage. Its first thread has the stage's work, its second what it waits for. Arrows are messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama_fn.planner.piped import PipelinePlan
from llama_fn.planner.pipeline import Event, Key, needs, parts_of
from sharding.schedules import Work

WORK, WAITING = 0, 1  # threads
MICRO = 1e6


def trace(made: PipelinePlan) -> dict[str, Any]:
    """In the format of Chrome's trace viewer (a JSON object with `traceEvents`); times in microseconds."""
    return {"traceEvents": list(_events(made)), "displayTimeUnit": "ms"}


def name_of(work: Work) -> str:
    """ "forward 3", "backward 3 of chunk 1"."""
    return f"{work.kind} {work.microbatch}" + (f" of chunk {work.chunk}" if work.chunk else "")


def _events(made: PipelinePlan) -> Iterator[dict[str, Any]]:
    line, total = made.timeline, made.before_s + made.timeline.step_s
    done: dict[Key, tuple[int, Event]] = {}
    for stage, events in enumerate(line.stages):
        yield {"ph": "M", "name": "process_name", "pid": stage, "args": {"name": f"stage {stage}"}}
        for thread, name in ((WORK, "work"), (WAITING, "waiting")):
            yield {"ph": "M", "name": "thread_name", "pid": stage, "tid": thread, "args": {"name": name}}
        yield _span("before the microbatches", stage, WORK, 0.0, made.before_s)
        yield _span("after the microbatches", stage, WORK, total, total + made.after_s)
        free = 0.0
        for event in events:
            begin, end = made.before_s + event.begin_s, made.before_s + event.end_s
            yield _span(name_of(event.work), stage, WORK, begin, end, kind=event.work.kind, scope=event.work.microbatch)
            if event.begin_s > free:
                yield _span("idle", stage, WAITING, made.before_s + free, begin)
            free = event.end_s
            done[event.work.kind, event.work.microbatch, event.work.chunk * len(line.stages) + stage] = stage, event
    yield from _messages(made, done)


def _span(name: str, stage: int, thread: int, begin_s: float, end_s: float, **args: Any) -> dict[str, Any]:
    times = {"ts": begin_s * MICRO, "dur": (end_s - begin_s) * MICRO}
    return {"ph": "X", "name": name, "pid": stage, "tid": thread, **times, "args": args}


def _messages(made: PipelinePlan, done: dict[Key, tuple[int, Event]]) -> Iterator[dict[str, Any]]:
    """An arrow from the work that sends to the one that receives."""
    parts = parts_of([[event.work for event in events] for events in made.timeline.stages])
    for number, (key, (stage, event)) in enumerate(done.items()):
        for need in needs(event.work, key[2], parts):
            source, sent = done[need]
            if source != stage:
                common = {"name": "message", "cat": "message", "id": number, "tid": WORK}
                yield {**common, "ph": "s", "pid": source, "ts": (made.before_s + sent.end_s) * MICRO}
                yield {**common, "ph": "f", "bp": "e", "pid": stage, "ts": (made.before_s + event.begin_s) * MICRO}
