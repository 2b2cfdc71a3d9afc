"""Names that mean nothing are errors with the nearest that does; copies are made where they are asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llama_fn.compiler import stages
from llama_fn.config_fields import with_values
from llama_fn.errors import UserError
from llama_fn.model.arrays import ArrayInfo
from llama_fn.planner import config_stages
from sharding import Mesh, P, constrain
from sharding.rules import PRESETS, Rules

X = ArrayInfo((8, 8), torch.float32, ("batch", "embed"), table="compute")


def lower(fn, mesh, rules):
    return stages.jit(fn).trace(X).lower(Mesh.parse(mesh), rules)


@pytest.mark.parametrize(
    "axes, rules, message",
    [
        ("dta:2", "fsdp_tp", "over mesh axis 'dta': its 2 devices .* Did you mean data?"),
        ("data:2,modle:2", "fsdp_tp", "'modle': its 2 devices .* Did you mean model?"),
        ("expert:2", "fsdp_tp", "'expert': its 2 devices .* Known: data, model, node"),
        ("context:2", "fsdp_tp", "'context': its 2 devices"),
        ("data:2,model:2", "fsdp", "'model': its 2 devices"),
        ("pip:2", "dp", "'pip': its 2 devices .* Did you mean pipe?"),
    ],
)
def test_a_mesh_axis_over_which_nothing_is_sharded_is_an_error(axes, rules, message, tiny_config):
    cfg = with_values(tiny_config(), {"mesh.axes": axes, "mesh.rules": rules})
    traced = config_stages.train(cfg)
    with pytest.raises(UserError, match=message):
        config_stages.lower(traced, cfg, config_stages.mesh(cfg))
    names = ",".join(name for name, _ in Mesh.parse(axes).axes)
    cfg = with_values(cfg, {"mesh.replicated": names})
    assert config_stages.lower(traced, cfg, config_stages.mesh(cfg)).mesh == Mesh.parse(axes)


def test_copies_are_asked_for_by_axes_that_exist(tiny_config):
    cfg = with_values(tiny_config(), {"mesh.axes": "data:2", "mesh.replicated": "modle"})
    with pytest.raises(UserError, match=r"--mesh.replicated=modle: data:2 has no axis modle"):
        config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))


def test_an_axis_of_one_device_shards_nothing_and_is_no_error(tiny_config):
    cfg = with_values(tiny_config(), {"mesh.axes": "data:2,context:1,pipe:1", "mesh.rules": "fsdp"})
    assert config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg)).collectives()


def test_a_logical_axis_that_nobody_knows_is_an_error_with_its_line():
    with pytest.raises(UserError, match=r"test_nothing_silent.py:\d+\): logical axis 'btach' .* Did you mean batch?"):
        lower(lambda x: constrain(x, P("btach", None)), "data:2", "dp")
    with pytest.raises(UserError, match="logical axis 'hedas'"):
        stages.jit(lambda x: constrain(x, P("batch", "hedas"))).trace(X).lower()
    assert lower(lambda x: constrain(x, P("batch", "attn_seq")), "data:2", "dp").inputs[0] == P("data", None)


def test_an_axis_that_an_array_declares_or_a_table_names_is_known():
    mine = Rules("mine", {}, {}, {"batch": ("data",), "inner": ("data",)})
    declared = ArrayInfo((8,), torch.float32, ("outer",))
    fn = lambda x, y: constrain(x, P("inner", None)) * constrain(y, P("outer"))  # noqa: E731
    lowered = stages.jit(fn).trace(ArrayInfo((8, 8), torch.float32), declared).lower(Mesh.parse("data:2"), mine)
    assert lowered.outputs[0] == P("data", None)


def test_a_table_with_an_axis_that_nothing_has_is_an_error():
    odd = replace(PRESETS["dp"], name="odd", compute={**PRESETS["dp"].compute, "bacth": ("data",)})
    with pytest.raises(UserError, match=r"rules odd: .* logical axis 'bacth'.*Did you mean batch"):
        lower(lambda x: x + 1, "data:2", odd)
