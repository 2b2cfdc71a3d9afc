"""Every number has bounds and is held to them; choices, types and texts too; only what passes becomes a step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llama_fn import config_fields
from llama_fn.config import Config
from llama_fn.config_checks import check, dump_ranks, profiled, resolved, split_weights, without_effect
from llama_fn.config_fields import each_field, with_values
from llama_fn.errors import UserError
from llama_fn.launch import Launch, launched
from llama_fn.model import train_step

FIELDS = {name: (field, value) for name, field, value in each_field(Config())}
NUMBERS = {name: field.metadata.get("bounds") for name, (field, value) in FIELDS.items() if type(value) in (int, float)}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds_and_what_lies_outside_is_refused(name):
    bounds, kind = NUMBERS[name], type(FIELDS[name][1])
    assert bounds is not None, "say beside its default what it may be"
    below = bounds.least if bounds.open else bounds.least - (1 if kind is int else max(1e-3, abs(bounds.least)))
    outside = [below, bounds.most * 2 if bounds.most else 1]
    if kind is float:
        outside += [math.nan, math.inf, -math.inf]
    for value in outside:
        with pytest.raises(UserError, match=f"--{name}=.* must be"):
            check(with_values(Config(), {name: kind(value) if math.isfinite(value) else value}))
    for wrong in ("3", True, None, [1]):
        with pytest.raises(UserError, match=f"--{name}=.* expected {kind.__name__}"):
            check(with_values(Config(), {name: wrong}))
    assert bounds.hold(FIELDS[name][1])


@pytest.mark.parametrize("name", [n for n, (_, v) in FIELDS.items() if type(v) in (bool, str)])
def test_texts_and_switches_are_of_their_type(name):
    with pytest.raises(UserError, match=f"--{name}=7 "):
        check(with_values(Config(), {name: 7}))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optim.schedule": "cosin"}, "Did you mean cosine"),
        ({"model.compute_dtype": "float32"}, "not a choice"),
        ({"data.split": "²,1"}, "up to three non-negative numbers"),
        ({"data.split": "1,2,3,4"}, "up to three"),
        ({"data.split": "0,0"}, "sum to 0"),
        ({"data.split": "1e5"}, "up to three"),
        ({"data.split": "nan"}, "up to three"),
        ({"data.split": "-1,2"}, "up to three"),
        ({"run.profile_steps": "1:²"}, "FIRST:LAST"),
        ({"run.profile_steps": "1:2:3"}, "FIRST:LAST"),
        ({"run.profile_steps": "5"}, "FIRST:LAST"),
        ({"run.profile_steps": "3:2"}, "FIRST:LAST"),
        ({"run.dump_ranks": "²"}, "neither all nor ranks"),
        ({"run.dump_ranks": "-1"}, "neither all nor ranks"),
        ({"run.dump_ranks": ""}, "neither all nor ranks"),
        ({"run.workdir": ""}, "workdir is empty"),
        ({"run.workdir": "a\0b"}, "NUL character"),
        ({"run.device": "cpu:x"}, "expected auto, cpu, cuda or npu"),
        ({"data.path": "~nobody_of_this_name/x"}, "no home folder"),
        ({"data.global_batch_size": 6, "data.microbatches": 4}, "microbatches can be"),
        ({"optim.decay_steps": 3, "optim.warmup_steps": 4}, "more than optim.decay_steps"),
    ],
)
def test_what_contradicts_itself_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        resolved(with_values(Config(), values))


@pytest.mark.parametrize("make", ["make_train_step", "make_eval_step", "abstract_state", "abstract_batch"])
def test_an_unchecked_config_becomes_no_step(make):
    wrong = replace(Config(), data=replace(Config().data, global_batch_size=6, microbatches=4))
    with pytest.raises(UserError, match=r"data.global_batch_size=6 is not divisible by --data.microbatches=4"):
        getattr(train_step, make)(wrong)


def test_the_good_is_taken():
    cfg = with_values(Config(), {"optim.lr": 1, "run.profile_steps": "2:3", "run.dump_ranks": "0, 2"})
    assert profiled(resolved(cfg)) == range(2, 4) and dump_ranks(cfg.run) == [0, 2]
    assert split_weights("949,50,1") == [949, 50, 1] and split_weights(" .5, 1.") == [0.5, 1, 0]


def test_the_home_folder_stands_for_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    paths = {name: "~/y" for name, (field, _) in FIELDS.items() if field.metadata["path"]}
    assert len(paths) == 9
    flat = config_fields.flat(resolved(with_values(Config(), paths)))
    assert {flat[name] for name in paths} == {"/home/x/y"}


def test_permissions_for_once_are_not_saved():
    assert "run.accept_changes" not in config_fields.flat(Config(), "saved")
    assert len(config_fields.flat(Config(), "saved")) == len(config_fields.flat(Config())) - 1


def test_flags_without_effect_are_told():
    assert not list(without_effect(Config()))
    told = lambda **v: list(without_effect(with_values(Config(), {k.replace("__", "."): x for k, x in v.items()})))  # noqa: E731
    assert "nothing is dumped without" in told(run__dump_ranks="3")[0]
    assert "ends at iteration 300 without a validation" in told(run__eval_every=500)[0]
    assert "min_lr=3e-05 is above" in told(optim__lr=1e-5)[0]
    assert "only fp16 has a loss scale" in told(optim__loss_scale_window=10)[0]
    assert "one form of attention" in told(run__backend="eager", run__attention="flash")[0]
    assert "few or none of these" in told(run__keep_every=150)[0]


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"WORLD_SIZE": "2"}, "without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "3"}, "RANK=3 with WORLD_SIZE 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: a number"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE=²: a number"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE=-1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        (TORCHRUN, "without MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, **ADDRESS, "RANK": "2"}, "RANK=2 with WORLD_SIZE 2"),
        ({**TORCHRUN, **ADDRESS, "MASTER_PORT": "x"}, "MASTER_PORT=x"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(environ, message):
    with pytest.raises(UserError, match=message):
        launched(environ)


def test_what_launchers_say_is_understood():
    assert launched({}) == launched({"WORLD_SIZE": "", "RANK": " ", "LOCAL_WORLD_SIZE": ""}) == Launch()
    assert launched({"RANK": "0"}) == launched({"WORLD_SIZE": "1", "RANK": "0"}) == Launch()
    assert launched({**TORCHRUN, **ADDRESS}) == Launch(1, 2, 1, 2)
