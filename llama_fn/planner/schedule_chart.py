"""The schedule of a pipeline as a chart: a row for each stage, time to the right, white is idle."""

from __future__ import annotations

from typing import Any

from llama_fn.planner.pipeline import Event, Key, needs, parts_of
from llama_fn.planner.plan import Plan
from sharding.schedules import BACKWARD, FORWARD, WEIGHT

COLOURS = {FORWARD: "#2f6fb2", BACKWARD: "#d9731a", WEIGHT: "#8a6bbf"}
OUTSIDE = "#3f8f4f"  # before and after the microbatches
SHOWN = 6  # of the beginning: as many pieces of work of the first stage for each stage there is


def whole(axes: Any, plan: Plan) -> None:
    """The whole step."""
    made = plan.pipeline
    assert made is not None
    end = made.before_s + made.timeline.step_s
    for stage in range(len(made.stages)):
        axes.broken_barh([(0, made.before_s), (end, made.after_s)], (stage - 0.4, 0.8), color=OUTSIDE)
    _draw(axes, plan, end)
    axes.set(xlim=(0, made.step_s))


def beginning(axes: Any, plan: Plan) -> None:
    """How the pipeline fills, with messages and the numbers of microbatches."""
    made = plan.pipeline
    assert made is not None
    events = made.timeline.stages[0]
    last = events[min(len(events), SHOWN * len(made.stages)) - 1].end_s
    _draw(axes, plan, made.before_s + last)
    done = _done(plan)
    parts = parts_of([[event.work for event in each] for each in made.timeline.stages])
    for key, (stage, event) in done.items():
        if event.begin_s > last:
            continue
        middle = made.before_s + (event.begin_s + event.end_s) / 2
        text = {"ha": "center", "va": "center", "fontsize": 6, "color": "white", "clip_on": True}
        axes.text(middle, stage, event.work.microbatch, **text)
        for source, sent in (done[need] for need in needs(event.work, key[2], parts)):
            if source != stage:
                side = 0.4 if stage > source else -0.4
                times = (made.before_s + sent.end_s, made.before_s + event.begin_s)
                axes.plot(times, (source + side, stage - side), color="#888", linewidth=0.6)
    axes.set(xlim=(made.before_s, made.before_s + last))


def _done(plan: Plan) -> dict[Key, tuple[int, Event]]:
    made = plan.pipeline
    assert made is not None
    count = len(made.stages)
    return {
        (event.work.kind, event.work.microbatch, event.work.chunk * count + stage): (stage, event)
        for stage, events in enumerate(made.timeline.stages)
        for event in events
    }


def _draw(axes: Any, plan: Plan, until_s: float) -> None:
    made = plan.pipeline
    assert made is not None
    for kind, colour in COLOURS.items():
        for stage, events in enumerate(made.timeline.stages):
            spans = [
                (made.before_s + e.begin_s, e.end_s - e.begin_s)
                for e in events
                if e.work.kind == kind and made.before_s + e.begin_s < until_s
            ]
            if spans:
                axes.broken_barh(spans, (stage - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.2)
        if any(e.work.kind == kind for e in made.timeline.stages[0]):
            axes.bar(0, 0, color=colour, label=kind)
    axes.set(yticks=range(len(made.stages)), ylabel="stage", xlabel="s", ylim=(len(made.stages) - 0.5, -0.5))
