"""Every kernel's forward and every gradient against plain torch in float64, over shapes, dtypes and odd sizes.

The oracle is written here from the definitions with torch.einsum, F.cross_entropy, a softmax with a mask and autograd;
it shares no code with the kernels.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels as k
from kernels.registry import KERNELS
from llama_fn.compiler.backends import forms
from sharding import P, constrain
from sharding.messages import MESSAGES
from sharding.simulate import COLLECTIVES, FUSED

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 5e-2}
DTYPES = list(TOLERANCE)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def attention_oracle(q, key, v):
    groups = q.shape[2] // key.shape[2]
    key, v = key.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    z = torch.einsum("btnh,bsnh->bnts", q, key) * q.shape[-1] ** -0.5
    t = q.shape[1]
    z = z.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bnts,bsnh->btnh", z.softmax(-1), v)


def rope_oracle(x, theta=10000.0):
    t, h = x.shape[1], x.shape[-1]
    angle = torch.arange(t, dtype=torch.float64)[:, None] / theta ** (torch.arange(0, h, 2, dtype=torch.float64) / h)
    z = torch.complex(x[..., : h // 2], x[..., h // 2 :]) * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    return torch.cat([z.real, z.imag], -1)


def rope(x):
    cos, sin = k.rope_table(torch.empty(0), x.shape[1], x.shape[-1], 10000.0)
    return k.rope(x, cos.to(torch.float64 if x.dtype == torch.float64 else cos.dtype), sin.to(cos.dtype), False)


def targets(b, t, v):
    return torch.randint(0, v, (b, t), generator=torch.Generator().manual_seed(7))


def nll_oracle(logits, y):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape)


Y, YL = targets(2, 5, 11), targets(3, 401, 13)
CASES = {
    "einsum_ffn": (lambda x, w: k.einsum("btd,df->btf", x, w), lambda x, w: x @ w, [(2, 5, 7), (7, 3)]),
    "einsum_heads": (
        lambda x, w: k.einsum("btd,dnh->btnh", x, w),
        lambda x, w: torch.einsum("btd,dnh->btnh", x, w),
        [(2, 5, 8), (8, 3, 4)],
    ),
    "einsum_out": (
        lambda o, w: k.einsum("btnh,nhd->btd", o, w),
        lambda o, w: torch.einsum("btnh,nhd->btd", o, w),
        [(1, 3, 2, 4), (2, 4, 9)],
    ),
    "einsum_batched": (
        lambda a, b: k.einsum("gtd,gds->tgs", a, b),
        lambda a, b: torch.einsum("gtd,gds->tgs", a, b),
        [(3, 5, 2), (3, 2, 7)],
    ),
    "rms_norm": (
        lambda x, w: k.rms_norm(x, w, 1e-5)[0],
        lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * w,
        [(2, 5, 17), (17,)],
    ),
    "rope": (rope, rope_oracle, [(2, 9, 3, 10)]),
    "attention": (lambda q, x, v: k.attention(q, x, v, q.shape[-1] ** -0.5)[0], attention_oracle, [(2, 7, 4, 6)] * 3),
    "attention_gqa": (
        lambda q, x, v: k.attention(q, x, v, q.shape[-1] ** -0.5)[0],
        attention_oracle,
        [(1, 130, 6, 8), (1, 130, 2, 8), (1, 130, 2, 8)],
    ),
    "swiglu": (k.swiglu, lambda g, u: torch.nn.functional.silu(g) * u, [(2, 3, 13), (2, 3, 13)]),
    "bias": (k.bias, lambda x, b: x + b, [(2, 5, 3, 4), (3, 4)]),
    "embedding": (lambda w: k.embedding(w, Y), lambda w: w[Y], [(11, 6)]),
    "cross_entropy": (lambda z: k.cross_entropy(z, Y)[0], lambda z: nll_oracle(z, Y), [(2, 5, 11)]),
    "head_cross_entropy": (
        lambda x, w: k.head_cross_entropy(x, w, YL)[0],
        lambda x, w: nll_oracle(x @ w.t(), YL),
        [(3, 401, 5), (13, 5)],
    ),
    "constrain": (lambda x: constrain(x, P("batch", None)) * 2, lambda x: x * 2, [(3, 4)]),
    "unbind_stack": (lambda x: k.stack(k.unbind(x)[::-1]), lambda x: x.flip(0), [(3, 4, 2)]),
}


def error(got, want):
    return (got.double() - want).norm() / want.norm().clamp(min=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_float64_reference(name, dtype):
    fn, oracle, shapes = CASES[name]
    upcast = [rand(*shape, seed=i).to(dtype).double().requires_grad_() for i, shape in enumerate(shapes)]
    want = oracle(*upcast)
    weight = rand(*want.shape, seed=99).to(dtype)
    want_grads = torch.autograd.grad(want, upcast, weight.double())
    got, pull = torch.func.vjp(fn, *(x.detach().to(dtype) for x in upcast))
    got_grads = pull(weight.to(got.dtype))
    tolerance = TOLERANCE[dtype] if name != "rope" or dtype != torch.float64 else 1e-5  # the table is float32
    assert error(got, want) < tolerance
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        assert error(mine, theirs) < tolerance


@pytest.mark.parametrize("form", ["blocked", "flash"])
@pytest.mark.parametrize("shape", [(2, 64, 4, 4, 16), (1, 257, 4, 2, 8), (2, 3, 2, 1, 32)], ids=str)
def test_attention_forms_equal_the_reference(form, shape):
    b, t, n, kv, h = shape
    q, key, v, do = rand(b, t, n, h), rand(b, t, kv, h, seed=1), rand(b, t, kv, h, seed=2), rand(b, t, n, h, seed=3)
    want = KERNELS["attention"].reference(q, key, v, 0.3)
    got = forms.find("attention", form)(q, key, v, 0.3)
    backward = [f(do, q, key, v, *want, 0.3) for f in map(forms.find, ["attention_bwd"] * 2, ["reference", form])]
    for a, b_ in [*zip(got, want, strict=True), *zip(*backward, strict=True)]:
        assert a.shape == b_.shape and a.is_contiguous() and error(a, b_) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["head_loss", "head_loss_in_place"])
def test_a_loss_with_its_gradients_equals_float64(name, dtype):
    x, w, g = (rand(*shape, seed=i).to(dtype) for i, shape in enumerate([(3, 401, 5), (13, 5), (3, 401)]))
    wide = [each.double().clone().requires_grad_() for each in (x, w)]
    want = nll_oracle(wide[0] @ wide[1].t(), YL)
    want = [want, *torch.autograd.grad(want, wide, g.double())]
    for tokens in (2000, 512, 90):  # one block, a last one that is shorter, many
        for mine, theirs in zip(KERNELS[name].op(g, x, w, YL, tokens), want, strict=True):
            assert mine.shape == theirs.shape and error(mine, theirs) < TOLERANCE[dtype]


SAMPLES = {
    "matmul": (rand(4, 3), rand(5, 4), True, True),
    "einsum": ("btd,dnh->btnh", rand(2, 3, 4), rand(4, 2, 6)),
    "rms_norm": (rand(2, 3, 4), rand(4), 1e-5),
    "rms_norm_bwd": (rand(2, 3, 4), rand(2, 3, 4), rand(4), rand(2, 3, 1)),
    "rope_table": (rand(1), 5, 8, 1e4),
    "rope": (rand(2, 5, 3, 8), rand(5, 4), rand(5, 4), True),
    "attention": (rand(2, 5, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 8), 0.2),
    "attention_bwd": (
        rand(2, 5, 4, 8), rand(2, 5, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 8), rand(2, 5, 4, 8), rand(2, 4, 5), 0.2,
    ),
    "cached": (rand(2, 5, 2, 8), rand(2, 3, 2, 8), torch.tensor([4, 0])),
    "cached_attention": (rand(2, 1, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 8), torch.tensor([4, 0]), 0.2),
    "swiglu": (rand(2, 3, 4), rand(2, 3, 4)),
    "bias": (rand(2, 5, 3, 4), rand(3, 4)),
    "swiglu_bwd": (rand(2, 3, 4), rand(2, 3, 4), rand(2, 3, 4)),
    "embedding": (rand(11, 4), Y),
    "embedding_bwd": (rand(2, 5, 4), Y, rand(11, 4)),
    "cross_entropy": (rand(2, 5, 11), Y),
    "cross_entropy_bwd": (rand(2, 5), rand(2, 5, 11), Y, rand(2, 5)),
    "head_cross_entropy": (rand(2, 5, 4), rand(11, 4), Y),
    "head_cross_entropy_bwd": (rand(2, 5), rand(2, 5, 4), rand(11, 4), Y, rand(2, 5)),
    "head_loss": (rand(2, 5), rand(2, 5, 4), rand(11, 4), Y, 4),
    "head_loss_in_place": (rand(2, 5), rand(2, 5, 4), rand(11, 4), Y, 4),
    "weighted_sum": (rand(2, 5), rand(2, 5)),
    "embedding_part": (rand(11, 4), Y, torch.tensor(1)),
    "embedding_part_bwd": (rand(2, 5, 4), Y, torch.tensor(0), rand(6, 4)),
    "logits_part": (rand(2, 5, 6), Y, torch.tensor(1)),
    "head_part": (rand(2, 5, 4), rand(6, 4), Y, torch.tensor(1)),
    "part_max": (rand(2, 2, 5),),
    "part_sums": (rand(2, 2, 5), rand(2, 5)),
    "part_merge": (rand(2, 2, 5).abs(), rand(2, 5)),
    "head_part_bwd": (rand(2, 5), rand(2, 5, 4), rand(6, 4), Y, rand(2, 5), torch.tensor(1)),
    "join_rows": ([rand(4, 6), rand(2)], 2, "1,0"),
    "split_rows": (rand(2, 13), "1,0", "4x6,2"),
    "cross_entropy_part_bwd": (rand(2, 5), rand(2, 5, 6), Y, rand(2, 5), torch.tensor(1)),
    "constrain": (rand(3, 4), "batch,-", "compute"),
    "barrier": (rand(3, 4), rand(2)),
    "checkpoint_name": (rand(3, 4), "gate"),
    "reshard_as": (rand(3, 4), rand(3, 4)),
}  # fmt: skip


def test_every_kernel_but_the_collectives_has_a_sample():
    messages = {name for name, kernel in KERNELS.items() if kernel.op in MESSAGES}
    assert set(KERNELS) - set(SAMPLES) <= {*COLLECTIVES, *FUSED, *messages}


def test_a_token_at_its_place_is_that_row_of_all_tokens_at_once():
    """Rows at positions of their own: rope, the cache and attention over it, against the same of the whole sequence."""
    q, key, v = rand(2, 6, 4, 8), rand(2, 6, 2, 8, seed=1), rand(2, 6, 2, 8, seed=2)
    cos, sin = (table.double() for table in k.rope_table(torch.empty(0), 6, 8, 10000.0))
    positions = torch.tensor([5, 2])
    at = lambda x: torch.stack([row[p : p + 1] for row, p in zip(x, positions, strict=True)])  # noqa: E731
    assert torch.equal(k.rope(at(q), cos, sin, False, positions[:, None]), at(k.rope(q, cos, sin, False)))
    behind = torch.arange(6)[None, :, None, None] >= positions[:, None, None, None]
    keys, values = (
        k.cached(torch.where(behind, torch.full_like(x, 7.0), x), at(x), positions) for x in (key, v)
    )  # what lies behind is not read
    assert error(k.cached_attention(at(q), keys, values, positions, 8**-0.5), at(attention_oracle(q, key, v))) < 1e-12
    several = k.cached(torch.zeros(2, 6, 2, 8), key[:, :3].float(), positions)
    assert torch.equal(several[0, 5:], key[0, :1].float()) and torch.equal(several[1, 2:5], key[1, :3].float())
    assert not several[0, :5].any() and not several[1, :2].any() and not several[1, 5:].any()


@pytest.mark.parametrize(
    ("equation", "a", "b", "turned"),
    [
        ("btd,dnh->btnh", (2, 3, 4), (4, 5, 6), (False, False)),
        ("btnh,nhd->btd", (2, 3, 5, 6), (5, 6, 4), (False, False)),
        ("btd,vd->btv", (2, 3, 4), (7, 4), (False, True)),
        ("btd,btf->df", (2, 3, 4), (2, 3, 5), (True, False)),
        ("btd,btnh->dnh", (2, 3, 4), (2, 3, 5, 6), (True, False)),
        ("gtd,gds->tgs", (3, 5, 2), (3, 2, 7), (False, False)),
        ("abc,dca->bd", (2, 3, 4), (5, 4, 2), (False, False)),
    ],
)
def test_einsum_for_the_npu_is_one_product_of_what_lies_in_memory(equation, a, b, turned):
    """The npu form gives the reference's numbers, reading transposed operands without moving them."""
    x, y = rand(*a), rand(*b)
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is KERNELS["matmul"].op:
                seen.append(args[2:])
            return func(*args, **(kwargs or {}))

    with Spy():
        got = KERNELS["einsum"].npu(equation, x, y)
    assert error(got, torch.einsum(equation, x, y)) < 1e-14 and got.is_contiguous()
    assert seen == [turned]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_abstract_promises_what_the_reference_gives(name, dtype):
    cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    args = [[cast(y) for y in x] if isinstance(x, list) else cast(x) for x in SAMPLES[name]]
    promised, given = KERNELS[name].abstract(*args), KERNELS[name].reference(*args)
    as_tuple = lambda x: tuple(x) if isinstance(x, (tuple, list)) else (x,)  # noqa: E731
    for p, g in zip(as_tuple(promised), as_tuple(given), strict=True):
        assert (p.shape, p.dtype, p.stride()) == (g.shape, g.dtype, g.stride())


@pytest.mark.parametrize("name", [name for name in SAMPLES if KERNELS[name].factors(*SAMPLES[name]).rule != " -> "])
def test_factors_match_the_shapes(name):
    args = SAMPLES[name]
    rule = KERNELS[name].factors(*args)
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    results = KERNELS[name].reference(*args)
    results = results if isinstance(results, tuple) else (results,)
    sizes: dict[str, int] = {}
    for term, tensor in [*zip(rule.operands, tensors, strict=False), *zip(rule.results, results, strict=True)]:
        if term == ("_",):
            continue
        assert len(term) == tensor.dim(), (term, tensor.shape)
        for factor, size in zip(term, tensor.shape, strict=True):
            known = sizes.setdefault(factor, size)
            # Query heads and kv heads share the factor n: under GQA one is a multiple of the other.
            assert known == size or (factor == "n" and known % size == 0), (name, factor)
    assert rule.replicated <= set(sizes)


def test_einsum_flops_are_twice_the_product_of_sizes():
    args = SAMPLES["einsum"]
    assert KERNELS["einsum"].flops(*args) == 2 * 2 * 3 * 4 * 2 * 6


def test_einsum_refuses_a_letter_that_stands_once():
    with pytest.raises(ValueError, match="one term only"):
        k.einsum("ab,bc->b", rand(2, 3), rand(3, 4))
