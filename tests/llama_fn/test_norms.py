"""Norms of every layer, from inside of the step."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.model import train_step
from llama_fn.run import norms
from sharding import Mesh


def by_hand(values):
    """Norms of each leaf, of each layer where it stacks them."""
    return {
        path: x.double().flatten(1).norm(dim=1) if path.startswith("layers.") else x.double().norm()
        for path, x in tree.by_path(values).items()
    }


@pytest.mark.parametrize("mesh", ["", "data:2,model:2", "pipe:2"])
def test_norms_are_those_of_what_the_step_gives(mesh, tiny_config, random_inputs, fresh_state):
    cfg = tiny_config(compute_dtype="fp64")
    cfg = replace(cfg, data=replace(cfg.data, microbatches=2), run=replace(cfg.run, norms_every=5))
    step = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg))
    compiled = step.lower(Mesh.parse(mesh), "fsdp_tp").compile("interpret")
    before = fresh_state(cfg)
    old = tree.map(torch.clone, before.params)
    after, metrics = compiled(before, *random_inputs(cfg))
    got = metrics["norms"]
    change = tree.map(torch.sub, after.params, old)
    for kind, want in (("param", by_hand(after.params)), ("update", by_hand(change))):
        assert got[kind].keys() == want.keys()
        for path, norm in want.items():
            assert got[kind][path].shape == norm.shape
            torch.testing.assert_close(got[kind][path].double(), norm, rtol=1e-6, atol=1e-12)
    everything = math.hypot(*norms.totals({path: x.tolist() for path, x in got["grad"].items()}).values())
    # Layers are in it twice: as leaves, and as layers.
    layers = [x for path, x in got["grad"].items() if path.startswith("layers.")]
    once = math.sqrt(everything**2 - sum(float(x.square().sum()) for x in layers))
    assert once == pytest.approx(metrics["grad_norm"].item(), rel=1e-9)


def test_a_record_has_null_for_what_is_not_finite_and_whole_layers_for_the_board(tmp_path):
    class Board:
        def scalars(self, iteration, values):
            self.seen = iteration, values

    board = Board()
    log = norms.NormsLog(tmp_path / "norms.jsonl", board)
    log.write(7, {"grad": {"embed": torch.tensor(2.0), "layers.wq": torch.tensor([3.0, torch.inf]),
                           "layers.wo": torch.tensor([4.0, 1.0])}})  # fmt: skip
    log.close()
    row = json.loads((tmp_path / "norms.jsonl").read_text())
    assert row == {"iteration": 7, "grad": {"embed": 2.0, "layers.wq": [3.0, None], "layers.wo": [4.0, 1.0]}}
    iteration, values = board.seen
    assert iteration == 7 and values["norms_grad/layers/0"] == 5.0 and values["norms_grad/layers/1"] == math.inf
    assert values["norms_grad/embed"] == 2.0 and values["norms_grad/layers.wo"] == math.hypot(4, 1)
