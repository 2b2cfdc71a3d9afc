"""Remat: the numbers stay, ops are computed again in the final graph of every backend, and memory falls."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest
import torch
from torch._functorch.compile_utils import fx_graph_cse

from kernels.registry import of_node
from llama_fn import tree
from llama_fn.compiler import cost, ir
from llama_fn.compiler.passes.remat import recomputed
from llama_fn.compiler.passes.remat_regions import Remat, regions
from llama_fn.errors import UserError
from llama_fn.planner import config_stages
from sharding import Mesh

POLICIES = {
    "full": Remat("full"),
    "dots": Remat("dots"),
    "names": Remat("names", ("context", "out_proj", "gate")),
    "budget": Remat("budget", budget_bytes=30_000),
}


@pytest.fixture
def traced(tiny_config, with_data):
    def trace(**data):
        cfg = with_data(tiny_config(num_layers=3), **{"microbatches": 2, **data})
        return cfg, config_stages.train(cfg)

    return trace


def run(step, cfg, fresh_state, random_inputs):
    state = fresh_state(cfg)
    for i in range(2):
        state, metrics = step(state, *random_inputs(cfg, i))
    return [*tree.leaves(state), *tree.leaves(metrics)]


@pytest.mark.parametrize(
    ("mesh", "rules", "policy"),
    [
        pytest.param(*where, policy, marks=() if where[0] and policy in ("full", "names") else pytest.mark.slow)
        for where in (("", "dp"), ("data:2,model:2", "fsdp_tp"))
        for policy in POLICIES
    ],
)
def test_numbers_stay_bitwise(policy, mesh, rules, traced, fresh_state, random_inputs):
    cfg, step = traced()
    mesh = Mesh.parse(mesh)
    plain = step.lower(mesh, rules).compile("interpret")
    again = step.lower(mesh, rules, remat=POLICIES[policy]).compile("interpret")
    pairs = zip(*(run(s, cfg, fresh_state, random_inputs) for s in (plain, again)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "budget"])
def test_compiled_numbers_stay_bitwise(policy, traced, fresh_state, random_inputs, compile_cache):
    cfg, step = traced(microbatches=1)
    plain = step.lower().compile("inductor", cache=compile_cache)
    again = step.lower(remat=POLICIES[policy]).compile("inductor", cache=compile_cache)
    pairs = zip(*(run(s, cfg, fresh_state, random_inputs) for s in (plain, again)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def products(text):
    """Matrix products by the names that graphs and inductor's code have for them."""
    return len(re.findall(r"llama_fn\.einsum|extern_kernels\.b?mm\(", text))


@pytest.mark.parametrize(
    ("backend", "outlined"),
    [
        ("eager", False),
        ("interpret", False),
        pytest.param("inductor", True, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),
    ],
)
def test_ops_are_recomputed_in_the_final_graph(backend, outlined, traced, compile_cache):
    """inductor: in the code that it generates, with one subgraph for all layers, and with every layer inline."""
    compiles = backend == "inductor"
    options = {"outlined": outlined, "cache": compile_cache} if compiles else {}
    cfg, step = traced(microbatches=1 if compiles else 2)
    layers = cfg.data.microbatches * cfg.model.num_layers
    attention = 2 if compiles else 0  # products inside, as a formula
    wanted = {"full": 6 + attention, "dots": 0, "names": 4}
    counts = {}
    for policy in ("none", "full") if compiles else ("none", *wanted):
        compiled = step.lower(remat=POLICIES.get(policy, policy)).compile(backend, **options)
        counts[policy] = products(compiled.executable.code or compiled.as_text())
    calls = 1 if outlined else layers
    for policy in counts.keys() - {"none"}:
        assert counts[policy] - counts["none"] == calls * wanted[policy]


def test_each_policy_recomputes_what_it_says(traced):
    cfg, step = traced()
    layers = cfg.data.microbatches * cfg.model.num_layers
    wanted = {
        "full": {"einsum": 6, "attention": 1, "rms_norm": 2, "rope": 2, "swiglu": 1},
        "dots": {"einsum": 0, "attention": 0, "rms_norm": 2, "rope": 2, "swiglu": 1},
        "names": {"einsum": 4, "attention": 0, "rms_norm": 2, "rope": 2, "swiglu": 1},
    }
    for policy, ops in wanted.items():
        graph = step.lower(remat=POLICIES[policy]).graph_module.graph
        found = Counter(record.name for node in recomputed(graph) if (record := of_node(node.target)))
        assert found == Counter({op: layers * count for op, count in ops.items()})


def test_a_pass_that_merges_equal_ops_leaves_what_is_recomputed(traced):
    _, step = traced()
    gm = step.lower(remat="full").graph_module
    before = Counter(node.target for node in recomputed(gm.graph))
    merged = fx_graph_cse(gm.graph)
    after = Counter(n.target for n in merged.nodes if n.meta.get("custom", {}).get("note") == "recomputed")
    assert after == before and before
    unprotected = Counter(n.target for n in fx_graph_cse(_without_barriers(gm)).nodes)
    assert sum(unprotected.values()) < len(merged.nodes) - 10, "the barrier is what protects them"


def _without_barriers(gm):
    from kernels.barrier import barrier
    from llama_fn.compiler.passes import copy_graph

    gm = copy_graph(gm)
    for node in ir.calls(gm.graph):
        if node.target is barrier.op:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return gm.graph


def test_a_budget_is_kept_to_and_used(traced):
    """Kept beside what full keeps: what layers read, and the gradients' own operands."""
    _, step = traced()

    def kept(remat):
        graph = step.lower(remat=remat).graph_module.graph
        first = regions(graph)["microbatch/0/layers/0"].forward_pass
        inside = [r for r in regions(graph).values() if r.forward_pass == first]
        values = {
            node for r in inside for node in r.forward
            if any(ir.phase_of(u) == "backward" for u in node.users) and not cost.is_view(node)
        }  # fmt: skip
        return sum(cost.tensor_bytes(n.meta["val"]) for n in values), sum(map(cost.flops_of, ir.calls(graph)))

    base, most = kept("full")
    _, least = kept("none")
    flops = []
    for budget in (1, 6_000, 11_000, 17_000, 26_000, 40_000, 60_000, 10**9):
        size, found = kept(Remat("budget", budget_bytes=budget))
        assert size - base <= budget
        flops.append(found)
    assert flops == sorted(flops, reverse=True) and flops[0] == most and flops[-1] == least
    assert len(set(flops)) > 4, "more room, less to recompute"


def test_peak_memory_falls_and_is_predicted(traced, fresh_state, random_inputs):
    cfg, step = traced(seq_len=128)
    peaks = {}
    for policy in ("none", "dots", "full"):
        lowered = step.lower(remat=policy)
        compiled = lowered.compile("interpret")
        compiled(fresh_state(cfg), *random_inputs(cfg))
        peaks[policy] = compiled.memory_analysis().temporary_bytes
        assert lowered.memory_analysis().peak_bytes == pytest.approx(compiled.memory_analysis().peak_bytes, rel=0.05)
    assert peaks["full"] < peaks["dots"] < peaks["none"]


@pytest.mark.parametrize("policy", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_weights_are_gathered_again_one_layer_ahead(policy, traced, fresh_state, random_inputs, monkeypatch):
    monkeypatch.setattr(sys.modules["llama_fn.compiler.passes.regather"], "SMALL", 0)
    cfg, step = traced()
    mesh = Mesh.parse("data:2")
    plain, again = (step.lower(mesh, "fsdp", ["bucket"], remat=Remat(policy, gathers=g)) for g in (False, True))

    def gathers(lowered):
        starts = (n for n in ir.calls(lowered.graph_module.graph) if "all_gather_start" in str(n.target))
        return Counter((ir.phase_of(n), re.sub(r".*gather/", "", ir.scope_of(n))) for n in starts)

    assert not any(phase == "backward" for phase, _ in gathers(plain))
    # The last layer's backward follows its forward at once, and the first's forward its backward before.
    for layer, times in ((0, (1, 2)), (1, (2, 2)), (2, (2, 0))):
        for at, phase in enumerate(("forward", "backward")):
            assert gathers(again)[phase, f"layers/{layer}/wq"] == times[at]
    nodes = ir.calls(again.graph_module.graph)
    starts = {
        ir.scope_of(n): i
        for i, n in enumerate(nodes)
        if "all_gather_start" in str(n.target) and ir.phase_of(n) == "backward"
    }
    begins = {}
    for i, n in enumerate(nodes):
        if ir.phase_of(n) == "backward":
            begins.setdefault("/".join(ir.scope_of(n).split("/")[:4]), i)
    for microbatch in range(2):
        at = f"microbatch/{microbatch}"
        assert begins[f"{at}/layers/2"] > starts[f"{at}/gather/layers/1/wq"] > begins.get(f"{at}/final_norm", 0)
        assert begins[f"{at}/layers/1"] > starts[f"{at}/gather/layers/0/wq"] > begins[f"{at}/layers/2"]
    results = [run(x.compile("interpret"), cfg, fresh_state, random_inputs) for x in (plain, again)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_unknown_name_names_the_nearest(traced):
    with pytest.raises(UserError, match=r"'contxt'.*Did you mean context"):
        traced()[1].lower(remat=Remat("names", ("contxt",)))
