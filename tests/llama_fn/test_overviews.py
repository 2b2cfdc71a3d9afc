"""What a notebook shows of stages, states, plans and differences: short, and a part of a graph on request."""

from __future__ import annotations

import re

import pytest
import torch

from llama_fn.config import Config, DataConfig
from llama_fn.hardware import named
from llama_fn.inspect.changes import changes
from llama_fn.inspect.summary import summary
from llama_fn.model import arrays, random, train_step
from llama_fn.planner import config_stages, plan
from sharding import Mesh

LIMIT = 2000  # characters


@pytest.fixture(scope="module")
def traced():
    return config_stages.train(Config(data=DataConfig(microbatches=2)))


@pytest.fixture(scope="module")
def lowered(traced):
    return traced.lower(Mesh.parse("data:2,model:2"))


def test_stages_are_a_few_lines_with_what_they_cost(traced, lowered):
    compiled = traced.lower().compile("eager")  # whose loss and its backward are one op
    for stage, words in (
        (traced, ("step traced", "1,274 ops", "55.5 GFLOP (forward 18.3, backward 37.2)", "peak 248.3 MB")),
        (lowered, ("data:2,model:2, rules fsdp_tp", "36 all_gather over model", "19 reduce_scatter over data")),
        (compiled, ("compiled with eager in", "993 ops")),
    ):
        assert len(repr(stage)) < LIMIT and all(word in repr(stage) for word in words), repr(stage)
        page = stage._repr_html_()
        assert "layers/*/mlp" in page and page.count("<details>") == 3 == page.count("</details>")
        assert str(stage) == stage.as_text() and len(str(stage)) > 10 * LIMIT, "print shows all of it"


def test_html_has_every_op_once(lowered):
    cells = re.findall(r"</td><td class=n>([\d,]+)</td><td class=n>", lowered._repr_html_())
    assert sum(int(cell.replace(",", "")) for cell in cells) == sum(lowered.cost_analysis().ops.values())


def test_states_and_their_parts_are_a_line_for_each_field():
    infos = train_step.abstract_state(Config())
    state = arrays.materialize(infos, random.key(0))
    for tree in (infos, state):
        assert len(repr(tree)) < LIMIT and repr(tree).startswith("TrainState of 43 arrays, 15,784,711 numbers")
        assert "\n  step: int64[]\n  params: Params of 12 arrays, 5,261,568 numbers\n" in repr(tree)
    assert "lm_head: float32[4096, 256]" in repr(state.params) and "bq: None" in repr(state.params.layers)
    assert "starts: None" in repr(train_step.Batch(torch.ones(1, 2, 3), None, None))


def test_a_plan_says_what_it_found():
    made = plan.make(Config(), Mesh.parse("data:2"), named("ascend_910b1", "bf16"))
    assert len(repr(made)) < LIMIT and all(word in repr(made) for word in ("2 x ascend_910b1", "fits with", "MFU"))
    assert "all_gather" in made._repr_html_()


def test_differences_are_a_line_for_each_kind(lowered, traced):
    one, other = summary(lowered), summary(traced.lower(Mesh.parse("data:4"), remat="full"))
    found = changes(one, other)
    assert len(repr(found)) < LIMIT and repr(found).startswith("mesh: data:2,model:2 -> data:4\n")
    assert found._repr_html_().count("<li>") == len(found) > 20
    assert repr(changes(one, one)) == changes(one, one)._repr_html_() == "no difference"


def test_a_scope_of_a_graph_can_be_looked_at_alone(traced, lowered):
    for stage in (traced, lowered):
        lines = stage.as_text(scope="layers/1/mlp").splitlines()
        ops = [line for line in lines if line.startswith("  %")]
        assert len(ops) > 10 and all("layers/1/mlp" in line for line in ops)
        assert any("swiglu" in line for line in ops)
    with pytest.raises(ValueError, match=r"no op of step traced is in scope 'layer/1'. Did you mean layers/1"):
        traced.as_text(scope="layer/1")
