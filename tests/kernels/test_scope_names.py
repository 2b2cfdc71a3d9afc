"""Scopes are made and taken apart in one place; a model that calls its layers otherwise keeps everything."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kernels import scope_names
from kernels.scope_names import Scope, microbatch, of_path, parse
from llama_fn.compiler import ir, passes
from llama_fn.compiler.passes.outline import outline
from llama_fn.errors import UserError
from llama_fn.hardware import TABLE
from llama_fn.model import llama, weights
from llama_fn.planner import config_stages, plan, report
from sharding import Mesh

ROOT = Path(__file__).resolve().parents[2]
PARSED = {
    "": Scope(None, "", "", None, ""),
    "layers/3": Scope(None, "", "layers", 3, ""),
    "microbatch/1/layers/3/mlp": Scope(1, "", "layers", 3, "mlp"),
    "microbatch/1": Scope(1, "", "", None, ""),
    "microbatch/0/blocks/12/attention/rope": Scope(0, "", "blocks", 12, "attention/rope"),
    "gather/layers/3/wq": Scope(None, "gather", "layers", 3, "wq"),
    "microbatch/2/gather/layers/3": Scope(2, "gather", "layers", 3, ""),
    "gather/embed": Scope(None, "gather", "", None, "embed"),
    "reduce": Scope(None, "reduce", "", None, ""),
    "microbatch/0/accumulate/layers/1/w_up": Scope(0, "accumulate", "layers", 1, "w_up"),
    "reduced/7": Scope(None, "", "reduced", 7, ""),
    "layers/*/mlp": Scope(None, "", "", None, "layers/*/mlp"),
    "layers/-2/mlp": Scope(None, "", "layers", -2, "mlp"),
    "optimizer": Scope(None, "", "", None, "optimizer"),
}


@pytest.mark.parametrize("text", PARSED)
def test_scopes_are_taken_apart_and_put_together(text):
    scope = parse(text)
    assert scope == PARSED[text]
    assert scope.in_microbatch(scope.microbatch) == text
    if scope.layer is not None:
        assert scope.with_layer(scope.layer) == text
        assert parse(scope.with_layer(8)) == replace(scope, layer=8)
    assert parse(scope.in_microbatch(5)) == replace(scope, microbatch=5)


def test_the_constructors_make_what_the_parser_knows():
    assert parse(f"{microbatch(4)}/{scope_names.layer(2, 'blocks')}/mlp") == Scope(4, "", "blocks", 2, "mlp")
    assert parse(f"{microbatch(0, scope_names.ACCUMULATE)}/{of_path('layers[3].wq')}").layer == 3
    assert parse("microbatch/1/layers/3/mlp").place == "microbatch/1/layers/3"
    assert of_path("[0]") == "0" and of_path("") == "value"


def test_no_pattern_over_scopes_stands_elsewhere():
    literal = re.compile(r"""["'](?:[^"'\n]*/)?(layers|microbatch|gather|reduce|accumulate)/""")
    for path in [*ROOT.glob("kernels/*.py"), *ROOT.glob("sharding/*.py"), *ROOT.glob("llama_fn/**/*.py")]:
        if path.name == "scope_names.py":
            continue
        code = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text())
        assert not literal.search(code), (path, literal.search(code))


@pytest.fixture
def blocks(monkeypatch):
    for module in (llama, weights):
        monkeypatch.setattr(module, "layer", partial(scope_names.layer, group="blocks"))


def config(tiny_config, **mesh):
    cfg = tiny_config(num_layers=4, compute_dtype="bf16")
    cfg = replace(cfg, data=replace(cfg.data, microbatches=2, global_batch_size=8))
    return replace(cfg, mesh=replace(cfg.mesh, axes="data:2,model:2", regather=True, **mesh))


def order(cfg):
    """Ops of the lowered and of the outlined step, without the names of scopes."""
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    outlined = outline(passes.copy_graph(lowered.graph_module), None)
    texts = [[ir.target_text(node) for node in ir.calls(gm.graph)] for gm in (lowered.graph_module, outlined)]
    return [*texts, len(list(outlined.children()))]


@pytest.mark.slow
def test_layers_of_another_name_keep_overlap_outlining_and_planning(tiny_config, request, caplog):
    cfg = config(tiny_config)
    want, planned = order(cfg), plan.make(cfg, config_stages.mesh(cfg), TABLE["ascend_910b1"])
    request.getfixturevalue("blocks")
    assert order(cfg) == want and want[2] >= 2
    again = plan.make(cfg, config_stages.mesh(cfg), TABLE["ascend_910b1"])
    told = [report.as_json(each) | {"planning_s": 0} for each in (again, planned)]
    assert json.dumps(told[0], default=str).replace("blocks", "layers") == json.dumps(told[1], default=str)
    assert not [r for r in caplog.records if "finds no layer" in r.message]


def test_layers_without_numbers_are_told_by_every_pass_that_looks_for_them(tiny_config, monkeypatch, caplog):
    monkeypatch.setattr(llama, "layer", lambda i: f"block_{'abcdefgh'[i % 8]}")
    order(config(tiny_config))
    said = [r.getMessage() for r in caplog.records if "finds no layer" in r.getMessage()]
    assert len(said) == 2 and "gathered before the first product" in said[0] and "grows with depth" in said[1]
    assert all("kernels.scope_names.layer(i)" in text for text in said)
    deep = config(tiny_config)
    deep = replace(deep, model=replace(deep.model, num_layers=20))
    with pytest.raises(UserError, match=r"named with kernels.scope_names.layer\(i\)"):
        plan.make(deep, Mesh.parse("data:2,model:2"), TABLE["ascend_910b1"])
