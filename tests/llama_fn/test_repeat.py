"""What a trace runs once and copies is what it would have traced: the same ops, names, shapes, scopes and order."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from kernels.scope import named_scope, phase
from llama_fn import compat, config
from llama_fn.compat import tracing
from llama_fn.compiler import ir, stages
from llama_fn.model import presets, train_step, transforms
from llama_fn.model.arrays import ArrayInfo
from llama_fn.planner import config_stages

VECTOR = ArrayInfo((4,), torch.float32)


def tiny(microbatches=3, per_microbatch=False, **model):
    cfg = config.Config(model=replace(presets.preset("llama_tiny"), num_layers=2, **model))
    data = replace(cfg.data, microbatches=microbatches, global_batch_size=2 * microbatches)
    return replace(cfg, data=data, optim=replace(cfg.optim, reduce_per_microbatch=per_microbatch))


@pytest.mark.parametrize(
    ("dtype", "per_microbatch"),
    [
        ("bf16", False), ("fp32", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in
          (("fp32", False), ("bf16", True), ("fp16", False), ("fp16", True))),
    ],
)  # fmt: skip
def test_a_step_is_as_if_every_microbatch_had_been_traced(monkeypatch, per_microbatch, dtype):
    cfg = tiny(per_microbatch=per_microbatch, compute_dtype=dtype, fused_head=per_microbatch)
    calls, real = [], transforms.repeated

    def counted(fn):
        return real(lambda *args, **kwargs: (calls.append(fn), fn(*args, **kwargs))[1])

    def graphs():
        return [ir.as_text(each.flat(), "flat") for each in (config_stages.train(cfg), config_stages.evaluation(cfg))]

    for module in (train_step, transforms):
        monkeypatch.setattr(module, "repeated", counted)
    called = graphs()
    assert len(calls) == 2
    monkeypatch.setattr(tracing, "called_by", lambda tracer: nullcontext())
    assert called == graphs()
    assert len(calls) == 2 + 2 * 3


def test_a_call_is_copied_into_its_own_scope_and_phase():
    @transforms.repeated
    def twice(x):
        with named_scope("inner"):
            return {"sum": x + x, "same": x}

    def outer(x):
        with named_scope("first"):
            one = twice(x)
        with named_scope("second"):
            two = twice(one["sum"])
        with phase("optimizer"), named_scope("third"):
            return twice(two["same"])["sum"]

    nodes = [n for n in stages.jit(outer).trace(VECTOR).flat().graph.nodes if n.op == "call_function"]
    where = [(compat.labels(n)["scope"], compat.labels(n)["phase"]) for n in nodes]
    assert where == [("first/inner", "forward"), ("third/inner", "optimizer")]  # what "second" computes has no reader
    assert nodes[1].args[0] is nodes[0]


def test_other_shapes_and_other_traces_have_their_own_graph():
    @transforms.repeated
    def double(x):
        return x * 2

    def fn(x, y):
        return double(x), double(y), double(y)

    for n in (4, 8):
        traced = stages.jit(fn).trace(ArrayInfo((n,), torch.float32), ArrayInfo((2, n), torch.float32))
        assert [tuple(r.meta["val"].shape) for r in traced.flat().graph.nodes if r.op == "call_function"] == [
            (n,), (2, n), (2, n),
        ]  # fmt: skip


def test_repeated_within_repeated_and_within_a_gradient():
    square = transforms.repeated(lambda x: x * x)

    @transforms.repeated
    def outer(x):
        return square(x) + square(x + 1)

    def fn(x):
        value, grad = transforms.value_and_grad(lambda x: outer(x).sum())(x)
        return outer(x), outer(grad), value

    x = torch.arange(4.0)
    expected = (x * x + (x + 1) ** 2, torch.func.grad(lambda x: (x * x + (x + 1) ** 2).sum())(x))
    given = stages.jit(fn, backend="eager")(x)
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1], expected[1] * expected[1] + (expected[1] + 1) ** 2)


def test_a_tensor_that_is_no_argument_is_refused():
    def fn(x):
        inner = transforms.repeated(lambda y: y + x)
        return inner(x) + inner(x)

    with pytest.raises(ValueError, match=r"fn.<locals>.<lambda> is traced once .* Pass them as arguments"):
        stages.jit(fn).trace(VECTOR)


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x[:2], lambda x: (x, x)])
def test_a_fold_that_returns_another_total_than_it_takes_is_refused(change):
    def fn(x):
        return transforms.fold(lambda total, part: change(total + part), x, [x, x], (), ["a", "b"])

    with pytest.raises(ValueError, match="Return the structure, shapes and dtypes that it takes"):
        stages.jit(fn).trace(VECTOR)
