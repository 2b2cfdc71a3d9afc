"""When numbers are ruined: warned once, not saved, stopped after so many in a row; fp16's overflows are not meant."""

from __future__ import annotations

import json
import math

import pytest
import torch

from llama_fn.run import metrics
from llama_fn.run.health import Health

NAN, INF = math.nan, math.inf


def values(loss=1.0, norm=1.0, skipped=0, ruined=0):
    return {"lm_loss": loss, "grad_norm": norm, "skipped_iterations": skipped, "nonfinite_params": ruined}


def test_a_streak_is_counted_warned_of_once_and_ended_by_a_good_iteration(caplog):
    health = Health(3, scaled=False, good=10)
    health.observe(11, values(skipped=5))
    assert health.may_save and not health.verdict and not caplog.text
    for i in (12, 13):
        health.observe(i, values(NAN, NAN, skipped=5 + i - 11))
        assert health.streak == i - 11 and not health.may_save and not health.verdict
    health.observe(14, values(skipped=7))
    assert health.streak == 0 and health.may_save
    for i in (15, 16, 17):
        health.observe(i, values(1.0, INF, skipped=7 + i - 14))
    assert health.verdict == "3 iterations in a row were skipped (--run.stop_after_skipped=3)"
    assert len(caplog.records) == 1 and "iteration 12: loss nan, grad norm nan; skipped" in caplog.text


def test_a_step_that_was_broken_off_is_not_saved_and_says_why():
    """Its state holds old and new values (--run.check_finite)."""
    health = Health(20, scaled=False, good=3)
    assert health.may_save and not health.verdict
    health.stopped_by = "in iteration 4 an op gave nan"
    assert not health.may_save and health.verdict == "in iteration 4 an op gave nan"


def test_iterations_that_nobody_looked_at_are_counted_by_the_steps_own_count():
    health = Health(20, scaled=False, good=0)
    health.observe(10, values(skipped=0))
    health.observe(20, values(NAN, NAN, skipped=10))
    assert health.streak == 10
    health.observe(30, values(NAN, NAN, skipped=20))
    assert health.streak == 20 and health.verdict
    health.observe(40, values(NAN, NAN, skipped=23))
    assert health.streak == 3, "seven of them were good, and at most the last three are a streak"


def test_overflows_of_a_loss_scale_are_routine(caplog):
    health = Health(100, scaled=True, good=0)
    for i in range(1, 9):
        health.observe(i, values(1.0, INF, skipped=i))
    assert health.may_save and not caplog.text and health.streak == 8
    health.observe(9, values(NAN, NAN, skipped=9))
    assert not health.may_save and caplog.text


def test_parameters_that_are_not_finite_stop_at_once_whatever_the_limit():
    health = Health(0, scaled=True, good=4)
    health.observe(5, values(ruined=1))
    assert health.verdict == "the update of iteration 5 left parameters that are not finite" and not health.may_save


def test_zero_is_no_limit():
    health = Health(0, scaled=False, good=0)
    for i in range(1, 300):
        health.observe(i, values(NAN, NAN, skipped=i))
    assert not health.verdict


def test_a_record_is_json_whatever_its_numbers():
    row = {"iteration": 3, "lm_loss": NAN, "grad_norm": -INF, "mfu": None, "tokens_per_second": INF, "ok": 1.5}

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(metrics.as_json(row), parse_constant=refuse)
    assert read == {
        "iteration": 3, "lm_loss": None, "grad_norm": None, "mfu": None, "tokens_per_second": None, "ok": 1.5,
        "nonfinite": {"lm_loss": "nan", "grad_norm": "-inf", "tokens_per_second": "inf"},
    }  # fmt: skip
    assert json.loads(metrics.as_json({"lm_loss": 1.0})) == {"lm_loss": 1.0, "nonfinite": {}}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_step_sees_parameters_that_its_update_ruins(backend, tiny_config, random_inputs, fresh_state):
    from dataclasses import replace

    from llama_fn import tree
    from llama_fn.compiler import stages
    from llama_fn.model import train_step

    cfg = tiny_config(num_layers=1)
    cfg = replace(cfg, optim=replace(cfg.optim, lr=3.3e38, schedule="constant", weight_decay=1e3))
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    compiled = step.trace(*train_step.abstract_arguments(cfg)).lower().compile(backend)
    state, seen = compiled(fresh_state(cfg), *random_inputs(cfg))
    finite = all(torch.isfinite(x).all() for x in tree.leaves(state.params))
    assert not finite and math.isfinite(seen["lm_loss"]) and seen["skipped_iterations"] == 0
    assert seen["nonfinite_params"] == 1 and seen["nan_iterations"] == 1
    good = replace(cfg, optim=replace(cfg.optim, lr=1e-3, weight_decay=0.1))
    step = stages.jit(train_step.make_train_step(good), donate=0)
    compiled = step.trace(*train_step.abstract_arguments(good)).lower().compile(backend)
    _, seen = compiled(fresh_state(good), *random_inputs(good))
    assert seen["nonfinite_params"] == 0 and seen["nan_iterations"] == 0
