"""Ten mistakes that one makes with a step graph: each is named in the first three lines of what is said.

An error, a lint, the difference of two dumps, a table or a log line says it; docs/debugging.md shows each of these.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from llama_fn.compiler import stages
from llama_fn.compiler.finite import NonFinite
from llama_fn.compiler.lints import lints
from llama_fn.errors import UserError
from llama_fn.hardware import TABLE
from llama_fn.inspect import profile_table
from llama_fn.inspect.changes import changes, overview
from llama_fn.inspect.summary import summary
from llama_fn.model import llama, train_step
from llama_fn.run.compiling import which_code
from sharding import Mesh, P, constrain


def lowered(cfg, mesh="", rules="fsdp_tp", donate=0, **options):
    step = stages.jit(train_step.make_train_step(cfg), donate=donate)
    return step.trace(*train_step.abstract_arguments(cfg)).lower(Mesh.parse(mesh), rules, **options)


def first_three(*lines):
    return "\n".join("\n".join(map(str, lines)).splitlines()[:3])


def difference(before, after):
    return first_three(*overview(changes(summary(before), summary(after))))


def test_a_wrong_axis(tiny_config):
    with pytest.raises(UserError) as error:
        lowered(tiny_config(), "date:2")
    assert re.search("nothing is sharded over mesh axis 'date'.*data", first_three(error.value), re.DOTALL)


def test_remat_lost(tiny_config, monkeypatch):
    monkeypatch.setattr(llama, "remat", lambda fn: fn)
    said = first_three(*lints(lowered(tiny_config(), remat="full"), "full"))
    assert "policy full was asked for, and nothing is computed again" in said


def test_an_extra_all_reduce(tiny_config, monkeypatch):
    before = lowered(tiny_config(), "data:2")
    swiglu = llama.k.swiglu

    def gathered(gate, up):
        return constrain(constrain(swiglu(gate, up), P(None, None, None)), P("batch", None, None))

    monkeypatch.setattr(llama.k, "swiglu", gathered)
    said = difference(before, lowered(tiny_config(), "data:2"))
    assert "collectives: " in said and "all_gather over data" in said and "test_staged_faults.py" in said, said


def test_an_op_that_gives_nan(tiny_config, random_inputs, fresh_state, monkeypatch):
    swiglu = llama.k.swiglu
    monkeypatch.setattr(llama.k, "swiglu", lambda g, u: torch.sqrt(swiglu(g, u) - 1e9))
    cfg = tiny_config()
    with pytest.raises(NonFinite) as error:
        lowered(cfg).compile("interpret", check_finite=True)(fresh_state(cfg), *random_inputs(cfg))
    said = first_three(error.value)
    assert "aten.sqrt.default in microbatch/0/layers/0/mlp, forward, test_staged_faults.py:" in said


def test_a_dtype_that_leaks(tiny_config, monkeypatch):
    einsum = llama.k.einsum

    def wide(equation, a, b):
        return (
            einsum(equation, a.float(), b.float()).to(a.dtype) if equation == "btd,df->btf" else einsum(equation, a, b)
        )

    monkeypatch.setattr(llama.k, "einsum", wide)
    said = first_three(*lints(lowered(tiny_config(compute_dtype="bf16")), "none"))
    assert "products in float32" in said and "layers/*/mlp (test_staged_faults.py:" in said


def test_a_donation_that_is_lost(tiny_config):
    said = first_three(*lints(lowered(tiny_config(), donate=()), "none"))
    assert "state comes back as the first result, and is not donated" in said
    assert "is no longer overwritten in place" in difference(lowered(tiny_config()), lowered(tiny_config(), donate=()))


def test_another_attention_scale(tiny_config, monkeypatch):
    attention = llama.k.attention
    monkeypatch.setattr(llama.k, "attention", lambda q, k, v, scale: attention(q, k, v, 0.5))
    said = first_three(*lints(lowered(tiny_config()), "none"))
    assert "attention scale" in said and "0.5, and head_dim^-0.5 is 0.353553" in said and "layers/*/attention" in said


def test_which_code_ran(tmp_path):
    def twice_plus(c):
        step = stages.jit(lambda x: x * 2 + c).trace(torch.ones(64))
        return step.lower().compile("inductor", cache=tmp_path)

    keys = []
    for constant, how in ((1.0, "compiled"), (1.0, "loaded"), (3.0, "compiled")):
        said = first_three(which_code(twice_plus(constant)))
        match = re.fullmatch(rf"<lambda>: {how} in [\d.]+ s; code (\w+), .*", said)
        assert match, said
        keys.append(match[1])
    assert keys[0] == keys[1] != keys[2]


def test_another_order_of_mesh_axes(tiny_config):
    cfg = tiny_config()
    said = difference(lowered(cfg, "data:2,model:2"), lowered(cfg, "model:2,data:2"))
    assert said.startswith("mesh: data:2,model:2 -> model:2,data:2")


def test_a_slow_scope(tiny_config):
    step = lowered(replace(tiny_config(), data=replace(tiny_config().data, seq_len=8)))
    measured = {("microbatch/*/layers/*/mlp", "forward"): 1e-3, ("microbatch/*/layers/*/attention", "backward"): 9e-3}
    hardware = TABLE["a100"]
    said = first_three(profile_table.as_text(profile_table.rows(measured, step, hardware), hardware))
    assert re.search(r"9\.000 .* backward   microbatch/\*/layers/\*/attention", said.splitlines()[2]), said
