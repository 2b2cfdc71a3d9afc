"""The collectives of a LLaMA-65B step under every preset, against golden tables and against the counts they mean.

After an intended change: UPDATE_GOLDEN=1 python -m pytest tests/sharding/test_collectives_table.py
"""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.config import Config, DataConfig
from llama_fn.model import llama, train_step
from llama_fn.model.presets import preset
from sharding import Mesh, collectives_table

pytestmark = pytest.mark.slow  # 65B with all its layers
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MESHES = {
    "dp": "data:8", "zero1": "data:8", "fsdp": "data:96", "tp_sp": "model:8", "fsdp_tp": "data:12,model:8",
    "fsdp_tp_ulysses": "data:4,context:2,model:4",
}  # fmt: skip


@pytest.fixture(scope="module")
def traced():
    model = replace(preset("llama_65b"), compute_dtype="bf16")
    cfg = Config(model=model, data=DataConfig(seq_len=2048, global_batch_size=96))
    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    return step.trace(*train_step.abstract_arguments(cfg))


@pytest.mark.parametrize("rules", MESHES)
def test_the_table_of_llama_65b(rules, traced):
    rows = traced.lower(Mesh.parse(MESHES[rules]), rules).collectives()
    title = f"llama_65b, bf16, 2048 tokens, batch 96, mesh {MESHES[rules]}, rules {rules}"
    text = f"{title}\n{collectives_table.as_text(rows)}\n"
    text = re.sub(r"(\w+\.py):\d+", r"\1", text)  # lines move with every edit
    path = GOLDEN / f"collectives_{rules}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert all(row.source for row in rows if row.phase != "optimizer")
    if rules == "fsdp_tp":
        layers = [r for r in rows if "/layers/*" in r.scope and r.axis == "model" and r.scope.startswith("micro")]
        assert sum(r.count for r in layers if r.kind == "all_gather") == 4 * 80
        assert sum(r.count for r in layers if r.kind == "reduce_scatter") == 4 * 80
        matrices = [r for r in rows if "/layers/*/w" in r.scope and r.axis == "data"]
        assert sum(r.count for r in matrices if r.kind == "all_gather") == 7 * 80
        assert sum(r.count for r in matrices if r.kind == "reduce_scatter") == 7 * 80
        norm = [r for r in rows if r.axis == "data+model"]
        assert [r.count for r in norm] == [1, 1], "the norm of gradients, and whether all new parameters are finite"
        assert {r.kind for r in rows} == {"all_gather", "reduce_scatter", "all_reduce", "all_reduce_max"}


def test_gathers_and_reductions_name_the_declaration_of_their_parameter(traced):
    """What a `with` statement's line cannot tell: "layers.*.w_gate, llama.py:81" is the line that declares w_gate."""
    declared = inspect.getsource(llama).splitlines()
    seen = set()
    for row in traced.lower(Mesh.parse("data:12,model:8"), "fsdp_tp").collectives():
        if row.scope.startswith(("gather/", "reduce/")):
            for path, number in re.findall(r"([\w.*]+), llama\.py:(\d+)", row.source):
                name = path.rpartition(".")[2]
                assert declared[int(number) - 1].strip().startswith(f"{name}="), row.source
                seen.add((row.scope.partition("/")[0], path))
    paths = {re.sub(r"^layers\.", "layers.*.", path) for path in tree.paths(llama.abstract_params(preset("llama_65b")))}
    assert seen == {(role, path) for role in ("gather", "reduce") for path in paths}
