"""Pipeline schedules: in which order each stage of a pipeline works, as data.

A schedule is a function of the numbers of stages p, microbatches m and chunks v. It gives, for every stage, the list of
its work from first to last. A model is cut into v * p parts, and chunk c of stage s is part c * p + s. A part's forward
follows that of the part before it, and its backward that of the part behind it, microbatch by microbatch.

In the pictures a line is a stage and a column is a unit of time: 0, 1, .. are forwards of microbatches 0, 1, ..; a, b,
.. their backwards; A, B, .. their weight gradients, where these are work of their own; a dot is idle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

FORWARD, BACKWARD, WEIGHT = "forward", "backward", "weight gradient"


class Work(NamedTuple):
    """What a stage does next. BACKWARD includes the weight gradients unless the schedule has WEIGHT for them."""

    kind: str
    microbatch: int
    chunk: int = 0


Order = list[list[Work]]  # of every stage
Schedule = Callable[[int, int, int], Order]


def gpipe(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """All forwards, then all backwards, the last microbatch's first (Huang et al. 2019, GPipe).

    The bubble is (p-1) / (m+p-1) of a step. A stage keeps the activations of all m microbatches. With 3 stages and 4
    microbatches, a backward taking two units:

        0123......ddccbbaa
        .0123...ddccbbaa..
        ..0123ddccbbaa....
    """
    _refuse("gpipe", stages, microbatches, chunks)
    forwards = [Work(FORWARD, i) for i in range(microbatches)]
    backwards = [Work(BACKWARD, i) for i in reversed(range(microbatches))]
    return [[*forwards, *backwards] for _ in range(stages)]


def one_f_one_b(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """A forward and a backward in turn, once the pipeline is filled (Narayanan et al. 2021, PipeDream-flush).

    The bubble is GPipe's. Stage s keeps the activations of p - s microbatches, however many there are.

        012....aa3bb.cc.dd
        .01..aa2bb3cc.dd..
        ..0aa1bb2cc3dd....
    """
    _refuse("1f1b", stages, microbatches, chunks)
    forwards, backwards = ([Work(kind, i) for i in range(microbatches)] for kind in (FORWARD, BACKWARD))
    return [_in_turn(forwards, backwards, stages - stage - 1) for stage in range(stages)]


def interleaved(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """1F1B over several chunks of layers per stage (Narayanan et al. 2021, section 2.2; Megatron's schedule).

    Microbatches go in groups of p through one chunk after the other. The bubble is (p-1) / (v m + p - 1) of a step, and
    v times as many messages are sent. The number of microbatches must be a multiple of p.

        01012.aa3bb2aa3bb.cc.ddccdd
        .010aa1bb2aa3bb2cc3ddccdd..
    """
    if microbatches % stages:
        lower, upper = microbatches // stages * stages, -(-microbatches // stages) * stages
        raise ValueError(
            f"schedule interleaved: {microbatches} microbatches are not a multiple of {stages} stages; use "
            f"{lower or upper}{f' or {upper}' if lower else ''}"
        )
    total = [(i // (stages * chunks) * stages + i % stages, i // stages % chunks) for i in range(microbatches * chunks)]
    forwards = [Work(FORWARD, microbatch, chunk) for microbatch, chunk in total]
    backwards = [Work(BACKWARD, microbatch, chunks - 1 - chunk) for microbatch, chunk in total]
    apart = 2 if chunks > 1 else 1  # a stage further on begins to go back so much earlier
    ahead = [apart * (stages - stage - 1) + (chunks - 1) * stages for stage in range(stages)]
    return [_in_turn(forwards, backwards, n) for n in ahead]


def zb_h1(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """1F1B whose weight gradients fill the bubble (Qi et al. 2023, Zero Bubble Pipeline Parallelism, ZB-H1).

    Stage s puts off the weight gradients of s microbatches, so that it hands the gradients of its inputs on earlier.
    With forward, backward and weight gradient of one unit each the bubble is a third of 1F1B's, and a stage keeps the
    activations of p microbatches.

        012..aA3bB4cCdDeE
        .01.a2bA3cB4dCeDE
        ..0a1b2cA3dB4eCDE
    """
    _refuse("zb_h1", stages, microbatches, chunks)
    forwards, backwards = ([Work(kind, i) for i in range(microbatches)] for kind in (FORWARD, BACKWARD))
    order = []
    for stage in range(stages):
        work = []
        for each in _in_turn(forwards, backwards, stages - stage - 1):
            work.append(each)
            if each.kind == BACKWARD and each.microbatch >= stage:
                work.append(Work(WEIGHT, each.microbatch - stage))
        order.append([*work, *(Work(WEIGHT, i) for i in range(max(0, microbatches - stage), microbatches))])
    return order


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zb_h1": zb_h1}


def order_of(name: str, stages: int, microbatches: int, chunks: int, has_backward: bool = True) -> Order:
    """The order of a schedule by its name; without a backward, as in an evaluation, of its forwards alone. ValueError
    where it does not take these numbers."""
    order = SCHEDULES[name](stages, microbatches, chunks)
    return order if has_backward else [[work for work in works if work.kind == FORWARD] for works in order]


def _in_turn(forwards: list[Work], backwards: list[Work], ahead: int) -> list[Work]:
    """`ahead` forwards, then a forward and a backward in turn while there are forwards, then the other backwards."""
    ahead = min(ahead, len(forwards))
    turns = [work for pair in zip(forwards[ahead:], backwards, strict=False) for work in pair]
    return [*forwards[:ahead], *turns, *backwards[len(forwards) - ahead :]]


def _refuse(name: str, stages: int, microbatches: int, chunks: int) -> None:
    if chunks != 1:
        raise ValueError(
            f"schedule {name} has one chunk per stage, and {chunks} are asked for; interleaved takes several"
        )
