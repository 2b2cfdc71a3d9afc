"""--run.check_finite: the first op whose result is not finite is named, with scope, phase and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llama_fn import config
from llama_fn.compiler import stages
from llama_fn.compiler.finite import NonFinite
from llama_fn.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from llama_fn.errors import UserError
from llama_fn.model import llama, train_step
from llama_fn.run import health, loop
from sharding import Mesh


@pytest.mark.parametrize("backend, mesh", [("eager", ""), ("interpret", ""), ("interpret", "data:2,model:2")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_good_step_passes(backend, mesh, dtype, tiny_config, random_inputs, fresh_state):
    cfg = tiny_config(compute_dtype=dtype)
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    lowered = step.trace(*train_step.abstract_arguments(cfg)).lower(Mesh.parse(mesh))
    _, metrics = lowered.compile(backend, check_finite=True)(fresh_state(cfg), *random_inputs(cfg, 0))
    assert torch.isfinite(metrics["lm_loss"])


@pytest.mark.parametrize("backend, mesh, device", [("eager", "", ""), ("interpret", "data:2,model:2", " on device 0")])
def test_an_op_that_makes_nan_is_named(backend, mesh, device, tiny_config, random_inputs, fresh_state, monkeypatch):
    """A product that is fine but where it is zero, which it is in the second layer."""
    swiglu = llama.k.swiglu

    def poisoned(gate, up):
        y = swiglu(gate, up)
        return y + torch.log((y * y > 0).to(y.dtype) * 2 - 1)

    monkeypatch.setattr(llama.k, "swiglu", poisoned)
    cfg = tiny_config(num_layers=3)
    state = fresh_state(cfg)
    state.params.layers.w_gate[1] = 0
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    lowered = step.trace(*train_step.abstract_arguments(cfg)).lower(Mesh.parse(mesh))
    with pytest.raises(NonFinite) as error:
        lowered.compile(backend, check_finite=True)(state, *random_inputs(cfg, 0))
    where = r"aten.log.default in microbatch/0/layers/1/mlp, forward, test_finite.py:\d+"
    given = r"gave \d+ nan among \d+ values of f32\[.*\]. Its operands are finite: f32\[.*\] from -1 to -1"
    assert re.fullmatch(f"{where}{device} {given}", str(error.value)), error.value


def test_a_leaf_that_is_not_finite_is_named():
    step = stages.jit(lambda x, y: torch.sum(x * y)).trace(torch.ones(3), torch.ones(3)).lower()
    with pytest.raises(NonFinite, match=r"the step was given x with 1 inf among 3 values of f32\[3\]"):
        step.compile("eager", check_finite=True)(torch.tensor([1, torch.inf, 1]), torch.ones(3))


def test_a_run_stops_with_status_4_and_saves_nothing(tmp_path, capfd):
    corpus = tmp_path / "text.txt"
    corpus.write_bytes(Path(config.__file__).read_bytes() * 2)
    cfg = Config(
        model=ModelConfig(num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, mlp_dim=48, vocab_size=384),
        data=DataConfig(path=str(corpus), seq_len=16, global_batch_size=2),
        optim=OptimConfig(lr=1e30, min_lr=0.0, clip=0.0, schedule="constant"),
        run=RunConfig(backend="eager", check_finite=True, steps=9, checkpoint_every=1, workdir=str(tmp_path / "run")),
    )  # fmt: skip
    assert loop.run(cfg) == health.STATUS
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(r"stopped at iteration (\d+): in iteration \d+ .*gave .*Its operands are finite", said), said
    stopped = int(re.search(r"stopped at iteration (\d+)", said)[1])
    assert {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()} <= {
        stopped, stopped - 1
    }  # fmt: skip


def test_fused_code_is_refused():
    from llama_fn.config_checks import check

    with pytest.raises(UserError, match=r"--run.check_finite with --run.backend=inductor"):
        check(config.Config(run=RunConfig(check_finite=True)))
