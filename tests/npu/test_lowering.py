"""Whole steps lowered by the real torchair to Ascend GE graphs: which ops, updated in place, scopes, errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from jobs import JOBS, NIGHTLY, SHAPES, config_of

from llama_fn.inspect import dump
from llama_fn.planner import config_stages

# Everything that a step may become. What is missing here is not unsupported, it is unexpected.
POINTWISE = {
    "Abs", "Add", "ClipByValueV2", "Cos", "Equal", "Exp", "Less", "GreaterEqual", "Log", "LogicalAnd", "MaskedFill",
    "Mul", "Neg", "OnesLike", "Pow", "RealDiv", "Reciprocal", "SelectV2", "Sin", "Sqrt", "Sub", "Sxpy", "ZerosLike",
}  # fmt: skip
SHAPE = {
    "BroadcastTo", "Cast", "ConcatV2", "Const", "Data", "Fill", "Identity", "NetOutput", "Pack", "PadV3", "Range",
    "RefData", "Reshape", "SplitV", "Squeeze", "StridedSliceV2", "Transpose", "Triu", "Unpack", "Unsqueeze",
}  # fmt: skip
COMPUTE = {
    "EmbeddingDenseGrad", "FlashAttentionScore", "FlashAttentionScoreGrad", "GatherElements", "GatherV2", "MatMul",
    "ReduceLogSumExp", "ReduceMax", "ReduceSum", "RmsNorm", "RmsNormGrad", "RotaryMul", "SwiGlu", "SwiGluGrad",
}  # fmt: skip
COLLECTIVE = {
    "all_gather": "HcomAllGather", "all_reduce": "HcomAllReduce", "reduce_scatter": "HcomReduceScatter",
    "all_to_all": "HcomAllToAll",
}  # fmt: skip
FUSED = {"AllGatherMatmul", "MatmulReduceScatter"}
EXPECTED = POINTWISE | SHAPE | COMPUTE | set(COLLECTIVE.values())
OP = re.compile(r"^  %(\S+): .*? = (\w+)\(", re.M)


def text(folder: Path, rank: int = 0, graph: str = "") -> str:
    return (dump.rank_folder(folder, rank) / dump.ge_file(dump.GE_TEXT, graph)).read_text()


def counts(folder: Path, graph: str = "") -> Counter:
    return Counter(kind for _, kind in OP.findall(text(folder, graph=graph)))


def check_layers(found: Counter, layers: int) -> None:
    """Ops per layer: the fused ones of CANN stand where they should, and nothing is outside of the table."""
    print(", ".join(f"{count} {kind}" for kind, count in found.most_common()))
    assert set(found) <= EXPECTED, set(found) - EXPECTED
    assert found["RmsNorm"] == found["RmsNormGrad"] == 2 * layers + 1
    assert found["FlashAttentionScore"] == found["FlashAttentionScoreGrad"] == layers
    assert found["RotaryMul"] == 4 * layers, "queries and keys, forward and backward"
    assert found["SwiGlu"] == found["SwiGluGrad"] == layers
    assert found["MatMul"] == 3 * (7 * layers + 1), "seven matrices a layer and the head, each with two gradients"
    assert found["EmbeddingDenseGrad"] == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_the_step_of_llama_tiny_is_one_graph_of_expected_ops(dtype, lowered):
    found = counts(lowered[f"tiny_{dtype}"])
    check_layers(found, 4)
    assert not set(found) & set(COLLECTIVE.values())
    # step, 12 parameters, two moments each, two counts, skipped and nan; in fp16 the loss scale and its good steps.
    assert found["RefData"] == 1 + 36 + 2 + (4 if dtype == "fp16" else 2)


def check_collectives(found: Counter, job: str) -> None:
    """As many Hcom ops of every kind as the table of the lowered step has collectives."""
    cfg = config_of(JOBS[job])
    want: Counter = Counter()
    for row in config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg)).collectives():
        want[COLLECTIVE[row.kind.removesuffix("_max")]] += row.count
    assert {kind: found[kind] for kind in COLLECTIVE.values()} == {kind: want[kind] for kind in COLLECTIVE.values()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_rank_0_of_eight_has_the_collectives_of_the_table(dtype, lowered):
    job = f"tiny_{dtype}_data2_model4"
    check_layers(counts(lowered[job]), 4)
    check_collectives(counts(lowered[job]), job)


@pytest.mark.slow
def test_the_65b_slice_lowers_for_eight_devices(lowered):
    check_layers(counts(lowered["65b_8layers"]), 8)
    check_collectives(counts(lowered["65b_8layers"]), "65b_8layers")


@pytest.mark.parametrize(
    "job", [pytest.param(f"shape_{x}", marks=[pytest.mark.slow] * (f"shape_{x}" in NIGHTLY), id=x) for x in SHAPES]
)
def test_every_presets_shape_lowers(job, lowered):
    check_layers(counts(lowered[job]), 1)


def test_ulysses_exchanges_heads_for_sequence(lowered):
    assert counts(lowered["tiny_ulysses"])["HcomAllToAll"] == 2 * 2 * 4, "q, k, v and o, forward and backward"


def test_state_is_updated_in_place(lowered):
    options = json.loads((dump.rank_folder(lowered["tiny_fp32"], 0) / dump.GE_OPTIONS).read_text())
    names = re.findall(r"%(\S+): .*? = RefData\(\) index=(\d+)", text(lowered["tiny_fp32"]))
    assert {int(i) for _, i in names} == set(options["written_inputs"].values())
    assert "state_params_layers_wq" in {name for name, _ in names}
    assert options["graph"]["ge.topoSortingMode"] == "3", "our order stays"


def test_a_step_of_calls_is_three_graphs_and_gradients_are_added_in_place(lowered):
    """Six microbatches: the first, those between as one graph, and the last with the optimizer."""
    before, between, after = (counts(lowered["tiny_calls"], name) for name in ("part_0", "microbatch", "part_1"))
    for found in (before, between, after):
        assert found["FlashAttentionScore"] == 2 and found["MatMul"] == 3 * (7 * 2 + 1)
    parameters = 2 * 9 + 3
    assert before["RefData"] == 0 and between["RefData"] == parameters + 1, "and the sum of the loss"
    assert after["RefData"] == 1 + 3 * 12 + 2 + 2, "the state, as of a step that is one graph"
    assert "# backward microbatch/*/layers/1/mlp" in text(lowered["tiny_calls"], graph="microbatch")


def test_attributes_are_the_ones_that_the_model_asks_for(lowered):
    lines = text(lowered["tiny_bf16"])
    attention = re.search(r"= FlashAttentionScore\(.*", lines)[0]
    for part in ("head_num=4", "input_layout=BNSD", "sparse_mode=2", "next_tockens=0", "scale_value=0.125"):
        assert part in attention
    assert "atten_mask=%Triu" in attention and lines.count("= Triu(") == 1, "one mask for all layers"
    assert all("epsilon=9.99999" in line or "epsilon=1e-06" in line for line in re.findall(r"= RmsNorm\(.*", lines))
    assert "# forward microbatch/0/layers/3/attention" in lines and "# backward microbatch/0/layers/3/mlp" in lines


def test_no_transpose_stands_before_a_product(lowered):
    """MatMul reads transposed operands itself."""
    lines = text(lowered["tiny_bf16"]).splitlines()
    transposed = {re.match(r"  %(\S+):", line)[1] for line in lines if "= Transpose(" in line}
    products = [line for line in lines if "= MatMul(" in line]
    assert not any(f"%{name}," in line or f"%{name})" in line for line in products for name in transposed)


@pytest.mark.slow
def test_what_is_recomputed_is_in_the_graph_and_waits_for_the_gradient(lowered):
    found, layers = counts(lowered["tiny_remat"]), 2 * 2  # of two microbatches
    assert found["MatMul"] == 3 * (7 * layers + 2) + 6 * layers
    assert found["FlashAttentionScore"] == 2 * layers and found["FlashAttentionScoreGrad"] == layers
    assert found["RmsNorm"] == 2 * layers + 2 + 2 * layers and found["SwiGlu"] == 2 * layers
    check_collectives(found, "tiny_remat")
    held = re.findall(
        r"%(\S+): .*? = Identity\(x=%\S+\) after %(\S+)  # backward microbatch/./layers/", text(lowered["tiny_remat"])
    )
    assert len(held) == layers, "one control edge per layer, from the gradient to the first op computed again"


@pytest.mark.slow
def test_products_and_collectives_fuse_on_request(lowered):
    found = counts(lowered["65b_fused"])
    assert set(found) <= EXPECTED | FUSED
    # Per layer the inputs of both blocks and the sums of their products; in the backward the cotangents of the latter.
    # Of the head its input, and the product that gives its cotangent. The others' cotangents are sums of products.
    assert found["AllGatherMatmul"] == 2 * (2 + 2) + 1
    assert found["MatmulReduceScatter"] == 2 * 2 + 1
    assert "is_trans_b=True" in text(lowered["65b_fused"])


@pytest.mark.slow
def test_an_op_without_converter_is_named_with_its_place(torch_npu_environment):
    script = Path(__file__).with_name("worker_refused.py")
    done = subprocess.run([sys.executable, str(script)], env=torch_npu_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for part in (
        "no converter for 2 operators",
        "aten.lgamma.default in odd/place, forward",
        "aten.amax.default in odd/place",
    ):
        assert part in done.stdout
    assert "float64" in done.stdout
