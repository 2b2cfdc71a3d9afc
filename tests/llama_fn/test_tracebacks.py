"""Mistakes in a traced function: a dozen lines at most, which end in the user's file and say what to do."""

from __future__ import annotations

import importlib.util
import traceback

import pytest
import torch

from llama_fn import errors
from llama_fn.compiler import stages
from llama_fn.tools import command

MODULE = """
import torch
import kernels as k

weight = torch.ones(3, 3)

def branches(x):
    if x.sum() > 0:
        return x
    return -x

def reads(x):
    return x * x.sum().item()

def loops(x):
    while x.sum() < 10:
        x = x + 1
    return x

def selects(x):
    return x[x > 0].sum()

def does_not_fit(x):
    return k.einsum("btd,df->btf", x, x)

def multiplies(x):
    return inner(x)

def inner(x):
    return torch.matmul(x, torch.ones(7, 7))

def returns_a_number(x):
    return x, 3

def captures(x):
    return x @ weight

def drops(x):
    return torch.nn.functional.dropout(x, 0.1, training=True)

def mistypes(x):
    return x.transpoze(0, 1)

def takes_two(x, y):
    return x + y
"""
# What each ends in, and words of its message.
MISTAKES = {
    "branches": ("if x.sum() > 0:", "asks for the value of a tensor (user_model.py:8)"),
    "reads": ("return x * x.sum().item()", "torch.where"),
    "loops": ("while x.sum() < 10:", "asks for the value"),
    "selects": ("return x[x > 0].sum()", "asks for the value"),
    "does_not_fit": ('k.einsum("btd,df->btf", x, x)', "einsum"),
    "multiplies": ("return torch.matmul(x, torch.ones(7, 7))", "reduction dim|size"),
    "returns_a_number": (None, "returns a int as out.1."),
    "captures": (None, "uses tensors that are not among its arguments"),
    "drops": (None, "draws random numbers .*user_model.py:39"),
    "mistypes": ("return x.transpoze(0, 1)", "transpoze"),
    "takes_two": (None, "missing a required argument: 'y'"),
}


@pytest.fixture(scope="module")
def user_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "user_model.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("user_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_dozen_lines_that_end_where_it_was_made(name, user_model):
    last, words = MISTAKES[name]
    with pytest.raises(Exception, match=words if name not in ("branches",) else "asks for the value") as caught:
        stages.jit(getattr(user_model, name)).trace(torch.ones(3, 3))
    lines = "".join(traceback.format_exception(caught.value)).splitlines()
    assert len(lines) <= 12, "\n".join(lines)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [f.filename for f in frames if "site-packages" in f.filename] == [], "none of torch's"
    if last is not None:
        assert frames[-1].filename.endswith("user_model.py") and last in frames[-1].line
        assert str(frames[-1].lineno) in str(caught.value) or name not in ("branches", "reads", "loops", "selects")


def test_the_whole_traceback_is_kept(user_model, capsys):
    with pytest.raises(ValueError):
        stages.jit(user_model.branches).trace(torch.ones(3, 3))
    errors.full_traceback()
    whole = capsys.readouterr().err
    assert "user_model.py" in whole and "fake_tensor" in whole and len(whole.splitlines()) > 30


def test_a_second_trace_says_how_to_go_on(user_model):
    step = stages.jit(user_model.takes_two)
    step.trace(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="wrap the step anew"):
        step.trace(torch.ones(3), torch.ones(3))


def test_a_fault_of_ours_is_printed_whole_and_another_error_is_not_taken_for_it(user_model, capsys):
    assert command.status_of(lambda: stages.jit(user_model.mistypes).trace(torch.ones(3, 3))) == 1
    assert "transpoze" in capsys.readouterr().err
    with pytest.raises(KeyError, match="other"):
        command.status_of(lambda: {}["other"])
    assert "transpoze" not in capsys.readouterr().err
