"""Property: a kernel under any legal sharding of its factors, at any size, equals the unsharded kernel.

Every pair of factors (or one, or none) is tried as what the axes of a 2 x 2 mesh shard; hypothesis draws sizes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from on_purpose import copies

import kernels as k
from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.model.arrays import ArrayInfo
from sharding import Mesh, P, constrain
from sharding.rules import Rules

F64, I64 = torch.float64, torch.int64
MESH = Mesh.parse("x:2,y:2")

# fn, letters of its operands (":" marks ids into v), letters of its result, factors that have to stay whole
CASES = {
    "einsum": (lambda a, b: k.einsum("btd,df->btf", a, b), ["btd", "df"], "btf", ""),
    "einsum_heads": (lambda a, b: k.einsum("btnh,nhd->btd", a, b), ["btnh", "nhd"], "btd", ""),
    "einsum_batched": (lambda a, b: k.einsum("btd,bdf->btf", a, b), ["btd", "bdf"], "btf", ""),
    "rms_norm": (lambda x, w: k.rms_norm(x, w, 1e-6)[0], ["btd", "d"], "btd", "d"),
    "rope": (lambda x, c, s: k.rope(x, c, s, False), ["btnh", "tr", "tr"], "btnh", "htr"),
    "attention": (lambda q, key, v: k.attention(q, key, v, 0.5)[0], ["btnh", "bsnh", "bsnh"], "btnh", "tsh"),
    "attention_gqa": (lambda q, key, v: k.attention(q, key, v, 0.5)[0], ["btnh", "bsmh", "bsmh"], "btnh", "tsh"),
    "swiglu": (k.swiglu, ["btf", "btf"], "btf", ""),
    "bias": (k.bias, ["btnh", "nh"], "btnh", ""),
    "embedding": (k.embedding, ["vd", "bt:"], "btd", ""),
    "cross_entropy": (lambda z, y: k.cross_entropy(z, y)[0], ["btv", "bt:"], "bt", ""),
    "head_cross_entropy": (lambda x, w, y: k.head_cross_entropy(x, w, y)[0], ["btd", "vd", "bt:"], "bt", "d"),
    "weighted_sum": (k.weighted_sum, ["bt", "bt"], "", ""),
}  # fmt: skip


def shardings():
    for name, (_, operands, _, whole) in CASES.items():
        letters = sorted(set("".join(operands)) - {":", "m"} - set(whole))
        for x, y in itertools.product([None, *letters], repeat=2):
            yield name, x, y


def sizes(draw, operands, split):
    """A size per letter: a random multiple of what the mesh needs of it."""
    found = {}
    for letter in sorted(set("".join(operands)) - {":"}):
        found[letter] = split.get(letter, 1) * draw(st.integers(1, 3))
    if "h" in found:  # rope turns pairs
        found["h"], found["r"] = 2 * found["h"], found["h"]
    if "t" in found:
        found["s"] = found["t"]
    if "m" in found:  # kv heads: each serves a group of query heads
        found["m"] = found["n"]
        found["n"] *= draw(st.integers(1, 3))
    return found


def values(infos, rows):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(info.shape, dtype=F64, generator=generator) if info.dtype is F64
        else torch.randint(0, rows, info.shape, generator=generator)
        for info in infos
    ]  # fmt: skip


def value_and_gradients(fn, operands, result, floats):
    def step(args):
        def forward(*moving):
            full = list(args)
            for i, leaf in zip(floats, moving, strict=True):
                full[i] = leaf
            return constrain(fn(*full), P(*result.replace("m", "n")))

        out, pull = torch.func.vjp(forward, *(args[i] for i in floats))
        grads = pull(torch.cos(out))
        return out, [constrain(g, P(*operands[i].replace("m", "n"))) for i, g in zip(floats, grads, strict=True)]

    return step


@pytest.mark.parametrize(("name", "x", "y"), list(shardings()))
@seed(20)
@settings(max_examples=3, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_sharded_kernel_equals_the_whole_one(name, x, y, data):
    """Forward and gradients; mesh axis x shards one factor, y another, or the same."""
    fn, operands, result, _ = CASES[name]
    split: dict[str, int] = {}
    table: dict[str, tuple[str, ...]] = {}
    for axis, letter in (("x", x), ("y", y)):
        if letter:
            table[letter] = (*table.get(letter, ()), axis)
            split[letter] = split.get(letter, 1) * 2
    size = sizes(data.draw, operands, split)
    infos = [
        ArrayInfo(
            tuple(size[c] for c in op.strip(":")), I64 if op.endswith(":") else F64,
            tuple(op.strip(":").replace("m", "n")), table="compute",
        )
        for op in operands
    ]  # fmt: skip
    floats = [i for i, info in enumerate(infos) if info.dtype is F64]
    traced = stages.jit(value_and_gradients(fn, operands, result, floats)).trace(infos)
    args = values(infos, size.get("v", 1))
    want = traced.lower().compile("eager")(args)
    got = traced.lower(MESH, copies(Rules("test", {}, {}, table), MESH)).compile("interpret")(args)
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
