"""Products in 16 bits on a CPU without instructions for them: float32 products, rounded once."""

from __future__ import annotations

import re

import pytest
import torch

import kernels as k
from llama_fn import compat
from llama_fn.compiler import stages
from llama_fn.model.arrays import ArrayInfo

SHAPES = {"x": (2, 24, 32), "w": (32, 48), "row": (1, 1, 32)}


def step(x, w, row):
    gate = k.einsum("btd,df->btf", x, w)
    return gate, k.einsum("btf,btd->df", gate, x), k.einsum("btd,df->btf", row, w)


@pytest.fixture
def arguments():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES.values()]


def compiled(monkeypatch, slow):
    monkeypatch.setattr(compat, "slow_products", lambda: frozenset(slow))
    infos = [ArrayInfo(shape, torch.bfloat16, (None,) * len(shape)) for shape in SHAPES.values()]
    return stages.jit(step).trace(*infos).lower().compile("inductor")


def dtypes_of_products(program):
    return re.findall(r"%\S+: (\w+)\[[^\]]*\] = aten\.b?mm\.", program.as_text())


def test_products_of_a_slow_dtype_are_computed_in_float32(monkeypatch, arguments, caplog):
    program = compiled(monkeypatch, [torch.bfloat16])
    assert dtypes_of_products(program) == ["f32", "f32", "bf16"], program.as_text()  # the last has one row
    assert "no instructions for products in bfloat16" in caplog.text
    gate, back, _ = program(*arguments)
    x, w, _ = (a.float() for a in arguments)
    assert torch.equal(gate, (x @ w).bfloat16())
    want = torch.einsum("btf,btd->df", gate.double(), x.double())
    assert (back.double() - want).abs().max() <= 2**-8 * want.abs().max()


def test_a_product_of_a_value_with_itself(monkeypatch):
    monkeypatch.setattr(compat, "slow_products", lambda: frozenset([torch.bfloat16]))
    square = lambda x: torch.mm(x, x)  # noqa: E731
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    program = stages.jit(square).trace(ArrayInfo((32, 32), torch.bfloat16, (None, None))).lower().compile("inductor")
    assert torch.equal(program(x), (x.float() @ x.float()).bfloat16())


def test_products_of_other_dtypes_stay(monkeypatch, caplog):
    assert dtypes_of_products(compiled(monkeypatch, [torch.float16])) == ["bf16"] * 3
    assert "no instructions" not in caplog.text
