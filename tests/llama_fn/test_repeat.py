"""What a trace runs once and copies is what it would have traced: the same ops, names, shapes, scopes and order."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import kernels
from kernels import registry
from kernels.scope import named_scope, phase
from llama_fn import compat, config, tree
from llama_fn.compat import tracing
from llama_fn.compiler import calls, ir, stages
from llama_fn.model import arrays, presets, train_step, transforms
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


def layers_of(layer, weights, x):
    for i, w in enumerate(weights):
        with named_scope(f"layers/{i}"):
            x = transforms.remat(layer)(w, x)["x"]
    return x.sum()


@transforms.inlined
def deep(w, x):
    """Several results, one of them unread and one an operand; an operand without a gradient; an op kept whole."""
    with named_scope("inner"):
        y = kernels.swiglu(x * w["scale"], x) + w["shift"].to(x.dtype)
        return {"x": y, "unread": y * 2, "same": w["scale"], "sign": w["shift"] > 0}


WEIGHTS = [{"scale": torch.full((4,), 1.0 + i), "shift": torch.arange(4) + i} for i in range(3)]


def gradients(weights, x):
    scales = [w["scale"] for w in weights]

    def loss(given, x):
        return layers_of(deep, [{**w, "scale": s} for w, s in zip(weights, given, strict=True)], x)

    return transforms.value_and_grad(loss)(scales, x)


def test_an_inlined_function_is_traced_once_for_a_gradient_and_gives_what_it_gives_untraced():
    x, ran = torch.linspace(-1, 1, 4).reshape(1, 1, 4), []
    expected = gradients(WEIGHTS, x)
    original = kernels.swiglu.vjp
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._FUNCTIONS, "swiglu", registry.differentiable(
            "swiglu", kernels.swiglu.op, lambda *args: (ran.append(1), original(*args))[1]))  # fmt: skip
        traced = stages.jit(gradients).trace(*tree.map(arrays.abstract, (WEIGHTS, x)))
    assert len(ran) == 2  # of three calls: the first one's x needs no gradient
    given = traced.lower().compile("eager")(WEIGHTS, x)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(given), tree.leaves(expected), strict=True))


def test_an_inlined_call_is_written_out_in_the_scope_and_the_remat_region_of_the_call():
    graph = stages.jit(gradients).trace(*tree.map(arrays.abstract, (WEIGHTS, torch.ones(1, 1, 4)))).graph_module.graph
    kernel = [n for n in graph.nodes if "swiglu" in str(n.target)]
    where = [tuple(compat.labels(n)[key] for key in ("scope", "phase", "region")) for n in kernel]
    assert where == [
        *((f"layers/{i}/inner", "forward", f"layers/{i}") for i in range(3)),
        *((f"layers/{i}/inner", "backward", f"layers/{i}") for i in reversed(range(3))),
    ]
    assert not any(calls.is_call(n) for n in graph.nodes)


def test_inlined_within_inlined_and_outside_of_a_gradient():
    @transforms.inlined
    def outer(x):
        return deep({"scale": x, "shift": x}, x)["x"] + x

    def fn(x):
        value, grad = transforms.value_and_grad(lambda x: (outer(x) * outer(x + 1)).sum())(x)
        return value, grad, outer(outer(grad))

    # The gradients of x meet in another order: inside of a call first.
    x = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(1, 1, 4)
    torch.testing.assert_close(stages.jit(fn, backend="eager")(x), fn(x), rtol=1e-12, atol=0)


def test_an_inlined_function_in_another_transform_is_run_as_it_is():
    def fn(x):
        second = torch.func.grad(lambda x: torch.func.grad(lambda y: inlined_cube(y).sum())(x).sum())
        return second(x)

    inlined_cube = transforms.inlined(lambda x: x * x * x)
    x = torch.linspace(-1, 1, 4).reshape(1, 1, 4)
    assert torch.equal(stages.jit(fn, backend="eager")(x), fn(x))


def test_an_inlined_function_that_has_no_gradient_is_refused_in_one():
    positive = transforms.inlined(lambda x: x > 0)
    fn = transforms.value_and_grad(lambda x: torch.where(positive(x), x, -x).sum())
    with pytest.raises(ValueError, match="<lambda> is inlined in a gradient and returns nothing that has one"):
        stages.jit(lambda x: fn(x)).trace(VECTOR)


def test_a_tensor_that_is_no_argument_is_refused():
    def fn(x):
        inner = transforms.repeated(lambda y: y + x)
        return inner(x) + inner(x)

    def differentiated(x):
        inner = transforms.inlined(lambda y: y * x)
        return transforms.value_and_grad(lambda y: inner(y).sum())(x)

    for each in (fn, differentiated):
        with pytest.raises(ValueError, match=r"<locals>.<lambda> is traced once .* Pass them as arguments"):
            stages.jit(each).trace(VECTOR)


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x[:2], lambda x: (x, x)])
def test_a_fold_that_returns_another_total_than_it_takes_is_refused(change):
    def fn(x):
        return transforms.fold(lambda total, part: change(total + part), x, [x, x], (), ["a", "b"])

    with pytest.raises(ValueError, match="Return the structure, shapes and dtypes that it takes"):
        stages.jit(fn).trace(VECTOR)
