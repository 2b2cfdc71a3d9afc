"""Functions and arguments as a notebook user writes them: the same numbers as the plain call, or an error that names
the argument. Every backend."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.compiler.backends import Executable

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("eager", "interpret", "inductor")
NIGHTLY_COMPILED = (*BACKENDS[:2], pytest.param("inductor", marks=pytest.mark.slow))
x = torch.arange(6.0).reshape(2, 3)


def causal(scores):
    t = scores.shape[-1]
    return torch.where(torch.arange(t)[None, :] <= torch.arange(t)[:, None], scores, torch.full((), -1e9))


class Scaled:
    def __call__(self, x, by=2.0):
        return x * by


MAKERS = {
    "ones": lambda x: x + torch.ones(3), "zeros": lambda x: x + torch.zeros(2, 3), "eye": lambda x: x @ torch.eye(3),
    "arange": lambda x: x * torch.arange(3), "arange_float": lambda x: x * torch.arange(0.0, 1.5, 0.5),
    "full": lambda x: x - torch.full((2, 1), 0.5), "linspace": lambda x: x * torch.linspace(0, 1, 3),
    "ones_like": lambda x: x + torch.ones_like(x), "scalar": lambda x: x + torch.scalar_tensor(3.0),
    "empty_filled": lambda x: x + torch.empty(3).fill_(2.0), "tril": lambda x: x * torch.ones(2, 3).tril(),
    "new_ones": lambda x: x * x.new_ones(3), "alone": lambda x: (x, torch.zeros(2)), "mask": causal,
    "one_hot": lambda x: torch.nn.functional.one_hot(torch.arange(3), 3) + x[0], "no_arguments": lambda: torch.ones(3),
    "itself": lambda x: x, "twice": lambda x: (x + 1,) * 2, "view": lambda x: x.t(), "none": lambda x: (x * 2, None),
}  # fmt: skip


COMPILED = ("mask",)  # of the makers, on every commit; the rest by `make nightly`


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, b, marks=pytest.mark.slow if b == "inductor" and name not in COMPILED else ())
        for name in MAKERS
        for b in BACKENDS
    ],
)
def test_functions_that_make_tensors_give_what_the_plain_call_gives(name, backend):
    fn = MAKERS[name]
    arguments = () if name == "no_arguments" else (torch.ones(3, 3) if name == "mask" else x.clone(),)
    got, want = stages.jit(fn, backend=backend)(*arguments), fn(*arguments)
    assert tree.flatten(got)[1] == tree.flatten(want)[1]
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


GIVEN = {
    "transposed": ((x.t(),), {}), "sliced": ((x[:, ::2],), {}), "expanded": ((x[0].expand(4, 3),), {}),
    "numpy": ((x.numpy(),), {}), "numpy_reversed": ((x.numpy()[:, ::-1],), {}), "numpy_scalar": ((np.float32(3),), {}),
    "bfloat16": ((x.bfloat16(),), {}), "float": ((0.1,), {}), "int": ((3,), {}), "keyword": ((), {"x": x}),
    "empty": ((torch.ones(0, 3),), {}), "float64": ((x.double(),), {}),
}  # fmt: skip


# What reaches compiled code is the same for all kinds but those whose memory is laid out in another way.
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, b, marks=pytest.mark.slow if b == "inductor" and name != "sliced" else ())
        for name in GIVEN
        for b in BACKENDS
        if b != "inductor" or name in ("sliced", "expanded", "numpy_reversed")
    ],
)
def test_arguments_of_every_kind_give_what_the_plain_call_gives(name, backend):
    args, kwargs = GIVEN[name]
    plain = lambda x: torch.as_tensor(x.copy() if isinstance(x, np.ndarray) else x) * 2 + 1  # noqa: E731
    got, want = stages.jit(lambda x: x * 2 + 1, backend=backend)(*args, **kwargs), plain(*args, **kwargs)
    if name != "float":  # a Python float is a double, and torch.as_tensor makes a single of it
        assert got.dtype == want.dtype
    assert torch.equal(got, want.to(got.dtype)) or torch.allclose(got, want.double(), rtol=1e-7)


@pytest.mark.parametrize("backend", NIGHTLY_COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_number_argument_acts_as_in_the_plain_call(dtype, backend):
    fn = lambda x, lr, n: x - lr * x / n  # noqa: E731
    got, want = stages.jit(fn, backend=backend)(x.to(dtype), 0.1, 3), fn(x.to(dtype), 0.1, 3)
    assert got.dtype == dtype and torch.allclose(got, want, rtol=1e-15 if dtype == torch.float64 else 1e-2)
    if dtype == torch.float32:
        assert torch.allclose(got, want, rtol=1e-6)


CALLABLES = {
    "partial": functools.partial(lambda x, k: x * k, k=2.0), "object": Scaled(), "method": Scaled().__call__,
    "builtin": torch.neg, "variadic": lambda *xs: xs[0] + sum(xs), "keyword_only": lambda x, *, y=None: x + x,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLABLES)
def test_callables_of_every_kind_are_traced(name):
    fn = CALLABLES[name]
    assert torch.equal(stages.jit(fn, backend="eager")(x), fn(x))


def test_arguments_may_go_by_position_first_and_by_name_later():
    fn = stages.jit(lambda x, y, z: x - y * z, backend="eager")
    assert torch.equal(fn(x, x, z=2.0), x - x * 2)
    assert torch.equal(fn(z=3.0, y=x, x=x), x - x * 3)
    with pytest.raises(ValueError, match=r"z: expected f64\[\], given nothing"):
        fn(x, x)
    with pytest.raises(TypeError, match="two values for x"):
        fn(x, x, z=1.0, x=x)
    many = stages.jit(lambda *xs, k: sum(xs) * k, backend="eager")
    traced = many.trace(x, x, k=2.0)
    assert traced.signature.in_paths == ("xs[0]", "xs[1]", "k")


@pytest.mark.parametrize(
    "fn, args, message",
    [
        (lambda x, mode: x, (x, "sum"), "mode is a str"),
        (lambda x: x, ({"a": [object()]},), r"x.a\[0\] is a object"),
        (lambda x: x, (np.array(["a"]),), "x is a NumPy array of <U1"),
        (lambda x: x, (torch.eye(2).to_sparse(),), "x is a tensor of layout torch.sparse_coo"),
        (lambda x: (x, 3), (x,), r"returns a int as out\[1\]"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), (x,), "torch.full, torch.arange"),
        (lambda x: torch.nn.functional.dropout(x), (x,), r"draws random numbers \(aten.*, test_arguments.py:\d+\)"),
        (lambda x: x + torch.randn(3), (x,), r"draws random numbers \(aten.randn.default, test_arguments.py:\d+\)"),
        (lambda x: torch.bernoulli(x), (x,), "draws random numbers"),
        (lambda x: x + torch.randperm(3), (x,), "draws random numbers"),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, str) else "",
)
def test_what_is_no_array_or_no_function_of_its_arguments_is_refused_by_name(fn, args, message):
    with pytest.raises(ValueError, match=message):
        stages.jit(fn, backend="eager")(*args)


def test_wrong_arguments_are_pythons_own_error():
    with pytest.raises(TypeError, match=r"missing a required argument: 'y'"):
        stages.jit(lambda x, y: x + y, backend="eager")(x)
    with pytest.raises(ValueError, match=r"donate=1: there are 1 arguments \(x\)"):
        stages.jit(lambda x: x, donate=1, backend="eager")(x)


def adam(s, g):
    return {"mu": 0.9 * s["mu"] + 0.1 * g, "nu": 0.99 * s["nu"] + 0.01 * g * g}, g.sum()


@pytest.mark.parametrize("backend", NIGHTLY_COMPILED)
def test_memory_shared_with_a_donated_leaf_is_refused_and_neighbours_are_not(backend):
    flat, g = torch.zeros(5), torch.full((2,), 2.0)
    make = lambda: stages.jit(adam, donate=0, backend=backend)  # noqa: E731
    for s, grad, pair in (
        ({"mu": flat[:2], "nu": flat[:2]}, g, "s.mu and s.nu"),
        ({"mu": flat[:2], "nu": flat[1:3]}, g, "s.mu and s.nu"),
        ({"mu": g, "nu": flat[:2]}, g, "s.mu and g"),
        ({"mu": flat[3:], "nu": flat[:2]}, flat[1:3], "s.nu and g"),
    ):
        with pytest.raises(ValueError, match=f"{pair} share memory"):
            make()(s, grad)
    s, _ = make()({"mu": flat[:2], "nu": flat[2:4]}, g)
    assert torch.allclose(s["mu"], torch.tensor(0.2)) and torch.allclose(s["nu"], torch.tensor(0.04))
    square = torch.ones(2, 2)
    assert stages.jit(lambda a, b: a + b, backend=backend)(square, square).sum() == 8, "read only may share"


def test_one_of_several_positional_arguments_is_donated():
    """xs[1] is an argument of its own beside xs[0], though both begin with xs."""
    first, second = torch.ones(3), torch.full((3,), 2.0)
    compiled = (
        stages.jit(lambda *xs: (xs[0] + xs[1], xs[0] * 1), donate=0).trace(first, second).lower().compile("eager")
    )
    assert compiled.lowered.traced.signature.donations == [(0, "out[0]")]
    assert [len(compiled.lowered.layouts_of(name)) for name in ("xs[0]", "xs[1]", "xs")] == [1, 1, 2]
    total, kept = compiled(first, second)
    assert total.tolist() == [3.0] * 3 and kept.tolist() == [1.0] * 3


def test_donated_leaves_are_never_copied_in_silence():
    step = stages.jit(lambda s: (s * 2,), donate=0).trace(torch.ones(2, 3)).lower().compile("eager")
    for given, message in (
        (torch.ones(3, 2).t(), "s is donated and not contiguous"),
        (np.ones((2, 3), np.float32), "s is donated, and so must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            step(given)


def test_state_of_an_interrupted_step_is_refused_from_then_on():
    a, b = torch.ones(3), torch.ones(3)

    def interrupted(program):
        def run(leaves):
            leaves[0].add_(1)  # as far as it came
            raise KeyboardInterrupt

        return Executable(run, "")

    lowered = stages.jit(lambda s, g: ({"a": s["a"] + g, "b": s["b"] + g}, g), donate=0).trace(
        {"a": a, "b": b}, torch.ones(3)
    ).lower()  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        lowered.compile(interrupted)({"a": a, "b": b}, torch.ones(3))
    good = lowered.compile("eager")
    with pytest.raises(ValueError, match=r"s.a and 1 more was donated to a step that did not end"):
        good({"a": a, "b": b}, torch.ones(3))
    with pytest.raises(ValueError, match=r"s.a was donated to a step"):
        good({"a": a.view(3), "b": torch.ones(3)}, torch.ones(3))
    state, _ = good({"a": a.clone(), "b": torch.ones(3)}, torch.ones(3))
    assert state["b"].tolist() == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        ["taskset", "-c", "0"],
        pytest.param(["env", "TORCHINDUCTOR_COMPILE_THREADS=1"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_cpu_or_one_compile_thread_compiles(setting, tmp_path):
    code = (
        "import torch\nfrom llama_fn.compiler import stages\n"
        "step = stages.jit(lambda x: (x * 2).sum() + torch.ones(3)).trace(torch.ones(3)).lower()\n"
        "from pathlib import Path\n"
        f"for _ in range(2): print(step.compile('inductor', cache=Path({str(tmp_path)!r}))(torch.ones(3)))"
    )
    out = subprocess.run([*setting, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "tensor([7., 7., 7.])\n" * 2, out.stderr


def test_functions_that_make_tensors_are_partitioned_or_refused_with_the_annotation():
    from sharding import Mesh, P, constrain

    def masked(x, whole):
        ones = constrain(torch.ones(8), P("seq")) if whole else torch.ones(8)
        return constrain(x, P("seq")) * ones

    mesh = Mesh.parse("model:2")
    for whole in (True, False):
        traced = stages.jit(functools.partial(masked, whole=whole)).trace(torch.arange(8.0))
        if whole:
            step = traced.lower(mesh, "tp_sp").compile("interpret")
            assert torch.equal(step(torch.arange(8.0)), torch.arange(8.0))
        else:
            with pytest.raises(ValueError, match=r"sharded differently.*constrain"):
                traced.lower(mesh, "tp_sp")
