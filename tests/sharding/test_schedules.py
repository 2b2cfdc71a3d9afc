"""Pipeline schedules of every size up to 8 stages, 16 microbatches and 4 chunks: complete, free of deadlocks, within
their bounds; bubbles by the published formulas; the pictures are what a simulation gives."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest

from llama_fn.planner.pipeline import simulate, stashes
from sharding.schedules import BACKWARD, FORWARD, SCHEDULES, WEIGHT, Work

SIZES = [
    (name, p, m, v)
    for name, p, m, v in itertools.product(SCHEDULES, range(1, 9), range(1, 17), range(1, 5))
    if (v == 1 or name == "interleaved") and (name != "interleaved" or m % p == 0)
]


def units(name):
    """F = 1, B = 2 with the weight gradients in it, or 1 without."""
    return lambda stage, work: 2 if work.kind == BACKWARD and name != "zb_h1" else 1


def timeline(name, p, m, v, **more):
    return simulate(SCHEDULES[name](p, m, v), units(name), **more)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_microbatch_goes_once_through_every_part_and_back(name):
    for _, p, m, v in (size for size in SIZES if size[0] == name):
        kinds = (FORWARD, BACKWARD, WEIGHT) if name == "zb_h1" else (FORWARD, BACKWARD)
        want = sorted(Work(*work) for work in itertools.product(kinds, range(m), range(v)))
        for works in SCHEDULES[name](p, m, v):
            assert sorted(works) == want, (p, m, v)


def messages(order, kind, v):
    """What each stage sends to each other one, and what that one receives, in the order of either's work."""
    p = len(order)
    step = 1 if kind == FORWARD else -1
    sent, received = {}, {}
    for stage, works in enumerate(order):
        for work in (w for w in works if w.kind == kind):
            part = work.chunk * p + stage
            if 0 <= part + step < v * p:
                sent.setdefault((stage, (part + step) % p), []).append((work.microbatch, part + step))
            if 0 <= part - step < v * p:
                received.setdefault(((part - step) % p, stage), []).append((work.microbatch, part))
    return sent, received


@pytest.mark.parametrize("name", SCHEDULES)
def test_messages_pair_up_in_order_and_nothing_waits_for_ever(name):
    for _, p, m, v in (size for size in SIZES if size[0] == name):
        order = SCHEDULES[name](p, m, v)
        for kind in (FORWARD, BACKWARD):
            sent, received = messages(order, kind, v)
            assert sent == received, (p, m, v, kind)
        simulate(order, units(name), message_s=0.5)  # ValueError for a deadlock


@pytest.mark.parametrize("name", SCHEDULES)
def test_bubbles_are_those_of_the_papers(name):
    for _, p, m, v in (size for size in SIZES if size[0] == name):
        got = timeline(name, p, m, v)
        if name != "zb_h1":
            assert got.bubble == pytest.approx((p - 1) / (v * m + p - 1)), (p, m, v)
        elif m >= p:  # with fewer microbatches there is not enough to fill the bubble with
            assert got.step_s - 3 * m == p - 1 == (timeline("1f1b", p, m, 1).step_s - 3 * m) / 3, (p, m)


def bound(name, p, m, v, stage):
    if name == "gpipe":
        return m
    if name == "zb_h1":
        return min(m, p)
    return min(m * v, 2 * (p - stage - 1) + (v - 1) * p + 1) if v > 1 else min(m, p - stage)


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_are_within_the_bound_of_the_schedule(name):
    for _, p, m, v in (size for size in SIZES if size[0] == name):
        got = stashes(SCHEDULES[name](p, m, v))
        assert all(kept <= bound(name, p, m, v, stage) for stage, kept in enumerate(got)), (p, m, v, got)


DRAWN = {"gpipe": (3, 4, 1), "1f1b": (3, 4, 1), "interleaved": (2, 4, 2), "zb_h1": (3, 5, 1)}


@pytest.mark.parametrize("name, sizes", DRAWN.items())
def test_the_picture_of_a_schedule_is_what_a_simulation_gives(name, sizes):
    drawn = re.findall(r"^[0-9a-zA-Z.]{12,}$", inspect.cleandoc(SCHEDULES[name].__doc__).replace("    ", ""), re.M)
    assert "\n".join(drawn) == timeline(name, *sizes).picture()


def swapped(order):
    """The first stage's first two forwards change places."""
    first, second, *rest = order[0]
    return [[second, first, *rest], *order[1:]]


def test_what_is_wrong_is_found():
    order = SCHEDULES["1f1b"](4, 8, 1)
    sent, received = messages(swapped(order), FORWARD, 1)
    assert sent != received
    lost = [[work for work in works if work != Work(FORWARD, 3)] if i == 1 else works for i, works in enumerate(order)]
    with pytest.raises(ValueError, match=r"this schedule never ends: .*stage 2 at the forward of microbatch 3"):
        simulate(lost, units("1f1b"))
    backwards_first = [sorted(works, key=lambda work: work.kind) for works in order]
    with pytest.raises(ValueError, match="stage 3 at the backward of microbatch 0"):
        simulate(backwards_first, units("1f1b"))


def test_sizes_that_do_not_go_are_refused_with_those_that_would():
    with pytest.raises(ValueError, match=r"6 microbatches are not a multiple of 4 stages; use 4 or 8"):
        SCHEDULES["interleaved"](4, 6, 2)
    with pytest.raises(ValueError, match="schedule zb_h1 has one chunk per stage, and 2 are asked for"):
        SCHEDULES["zb_h1"](4, 8, 2)
