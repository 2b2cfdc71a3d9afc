"""A step of many microbatches is a graph of constant size, and computes what it would with every one written out."""

import operator
from dataclasses import fields, replace

import pytest
import torch

from kernels.scope_names import microbatch, without_numbers
from llama_fn import config, tree
from llama_fn.compiler import calls, ir, lowering, stages
from llama_fn.hardware import TABLE
from llama_fn.model import arrays, presets, random, train_step, transforms
from llama_fn.model.arrays import ArrayInfo
from llama_fn.planner import config_stages, plan
from sharding import Mesh

HARDWARE = TABLE["ascend_910b1"]
MESHES = {
    "one": dict(axes="data:1", rules="dp"),
    "fsdp": dict(axes="data:2", rules="fsdp"),
    "fsdp_tp": dict(axes="data:2,model:2", rules="fsdp_tp"),
    "ulysses": dict(axes="data:2,context:2", rules="fsdp_tp_ulysses"),
    "remat": dict(axes="data:2,model:2", rules="fsdp_tp", remat="full", regather=True),
}


def tiny(microbatches=6, per_microbatch=False, mesh="one", layers=2, **model):
    model = {"num_layers": layers, "embed_dim": 64, "mlp_dim": 96, "vocab_size": 128, **model}
    cfg = config.Config(model=replace(presets.preset("llama_tiny"), **model))
    return replace(
        cfg, data=replace(cfg.data, microbatches=microbatches, global_batch_size=2 * microbatches, seq_len=32),
        optim=replace(cfg.optim, reduce_per_microbatch=per_microbatch), mesh=replace(cfg.mesh, **MESHES[mesh]),
    )  # fmt: skip


def both(monkeypatch, cfg, trace=config_stages.train):
    """The step lowered with calls, and with every microbatch written out."""
    traced, mesh = trace(cfg), config_stages.mesh(cfg)
    rolled = config_stages.lower(traced, cfg, mesh)
    monkeypatch.setattr(lowering, "shortened", lambda gm, first: (gm, None))
    flat = config_stages.lower(traced, cfg, mesh)
    monkeypatch.undo()
    return rolled, flat


def called(lowered):
    return [node for node in ir.calls(lowered.graph_module.graph) if calls.is_call(node)]


def arguments(cfg, seed=0):
    rng = torch.Generator().manual_seed(seed)
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(1))
    batch = train_step.abstract_batch(cfg)
    ids = [torch.randint(cfg.model.vocab_size, batch.tokens.shape, generator=rng) for _ in range(2)]
    return state, train_step.Batch(*ids, torch.ones(batch.loss_mask.shape)), train_step.hyperparameters(cfg)


def run(lowered, cfg, backend, steps=2, **options):
    compiled = lowered.compile(backend, **options)
    state, *inputs = arguments(cfg)
    for _ in range(steps):
        state, metrics = compiled(state, *inputs)
    return compiled, tree.leaves((state, metrics))


EACH_COMMIT = (("one", False), ("fsdp_tp", True))


@pytest.mark.parametrize(
    ("mesh", "per_microbatch"),
    [
        pytest.param(mesh, often, marks=() if (mesh, often) in EACH_COMMIT else pytest.mark.slow)
        for mesh in MESHES
        for often in (False, True)
    ],
)
def test_a_step_is_what_it_is_with_every_microbatch_written_out(monkeypatch, mesh, per_microbatch):
    cfg = tiny(mesh=mesh, per_microbatch=per_microbatch)
    rolled, flat = both(monkeypatch, cfg)
    assert called(rolled) and not called(flat)
    (one, got), (other, expected) = run(rolled, cfg, "interpret"), run(flat, cfg, "interpret")
    assert all(map(torch.equal, got, expected))
    assert one.memory_analysis().peak_bytes <= 1.01 * other.memory_analysis().peak_bytes  # measured
    assert rolled.memory_analysis().peak_bytes <= 1.01 * flat.memory_analysis().peak_bytes
    assert cost(rolled) == cost(flat)
    by_scope = [{(c.scope, c.phase): c for c in plan.scope_costs(each, HARDWARE)} for each in (rolled, flat)]
    assert by_scope[0] == {key: approximately(c) for key, c in by_scope[1].items()}
    assert sorted(rolled.collectives()) == sorted(flat.collectives())
    # A gather that is begun for the next microbatch carries the number of the one in which it is begun.
    graphs = calls.inlined(rolled.graph_module), flat.graph_module
    one_way, other_way = (ops(each, numbered=not per_microbatch) for each in graphs)
    assert one_way == other_way


def approximately(c):
    """Seconds are summed in another order."""
    return replace(c, **{f.name: pytest.approx(getattr(c, f.name)) for f in fields(c) if f.name.endswith("_s")})


def cost(lowered):
    """But for the cutting of tokens, which costs nothing."""
    whole = lowered.cost_analysis()
    return replace(whole, ops={op: count for op, count in whole.ops.items() if "getitem" not in op})


def ops(gm, numbered):
    """Every op with its phase and scope, in order; the cutting of tokens, which has no fixed place, apart."""
    nodes = [node for node in ir.calls(gm.graph) if node.target is not operator.getitem]
    scopes = [ir.scope_of(node) if numbered else without_numbers(ir.scope_of(node)) for node in nodes]
    return [(node.target, ir.phase_of(node), scope) for node, scope in zip(nodes, scopes, strict=True)]


@pytest.mark.parametrize("microbatches", [1, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 16))])
def test_eager_and_interpret_agree_bitwise_for_any_number(monkeypatch, microbatches):
    cfg = tiny(microbatches)
    rolled, flat = both(monkeypatch, cfg)
    assert len(called(rolled)) == (microbatches - 1 if microbatches > 4 else 0)
    expected = run(flat, cfg, "eager")[1]
    for backend in ("eager", "interpret"):
        assert all(map(torch.equal, run(rolled, cfg, backend)[1], expected)), backend


@pytest.mark.slow
def test_inductor_agrees_bitwise_too(monkeypatch, tmp_path):
    cfg = tiny(5, layers=1)
    rolled, flat = both(monkeypatch, cfg)
    runs = [run(each, cfg, "inductor", cache=tmp_path) for each in (rolled, flat)]
    assert "= call(%microbatch, " in runs[0][0].as_text() and len(runs[0][0].executable.origins) == 3
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


def test_validation_too(monkeypatch):
    cfg = tiny(8, mesh="fsdp_tp")
    rolled, flat = both(monkeypatch, cfg, config_stages.evaluation)
    assert called(rolled)
    state, batch, _ = arguments(cfg)
    results = [each.compile("interpret")(state.params, batch) for each in (rolled, flat)]
    assert torch.equal(*results)


def test_graphs_grow_by_at_most_twenty_nodes_for_a_microbatch():
    sizes = {}
    for m in (16, 64):
        cfg = tiny(m, mesh="fsdp_tp")
        traced = config_stages.train(cfg)
        lowered = config_stages.lower(traced, cfg, config_stages.mesh(cfg))
        sizes[m] = [len(stage.graph_module.graph.nodes) for stage in (traced, lowered)]
    traced, lowered = ((many - few) / 48 for few, many in zip(sizes[16], sizes[64], strict=True))
    assert traced <= 20 and lowered <= 20


def test_a_body_is_printed_once_and_a_call_says_which():
    cfg = tiny(9)
    traced = config_stages.train(cfg)
    text = traced.as_text()
    assert text.count("graph microbatch_gradients {") == text.count("graph accumulated {") == 1
    assert text.count("= call(%accumulated, ") == 8 and text.count("= group(") == 1
    lowered = config_stages.lower(traced, cfg, Mesh()).as_text()
    assert lowered.count("graph microbatch {") == 1 and lowered.count("= call(%microbatch, ") == 8


def test_the_last_microbatch_is_called_too_unless_it_overlaps_with_reductions():
    traced = config_stages.train(tiny(9))
    lowered = [traced.lower(Mesh.parse(mesh), "fsdp", without=["bucket"]) for mesh in ("", "data:2")]
    assert [len(called(each)) for each in lowered] == [8, 7]


@pytest.mark.parametrize(("factors", "alike"), [({1: 2.0, 2: 2.0}, True), ({2: 2.0}, False), ({1: 2.0, 2: 3.0}, False)])
def test_microbatches_that_are_not_alike_are_written_out_and_said(caplog, factors, alike):
    """A pass of the user's own that does something to some of them."""

    def multiplied(gm, ctx):
        for number, factor in factors.items():
            ops = [node for node in ir.calls(gm.graph) if ir.place_of(node).microbatch == number]
            node = next(node for node in ops if node.target is torch.ops.aten.add.Tensor)
            with gm.graph.inserting_after(node):
                product = gm.graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product, delete_user_cb=lambda user, product=product: user is not product)
        return gm

    lowered = config_stages.train(tiny(7)).lower(first=[multiplied])
    assert bool(called(lowered)) == alike
    warning = "every microbatch is lowered by itself, as those between the first and the last differ: "
    assert (warning in caplog.text) != alike


@pytest.mark.parametrize("order", [1, -1])
def test_any_fold_in_numbered_scopes_is_rolled_if_it_takes_parts_in_their_order(order):
    def total(x, parts):
        def step(total, part, x):
            return {"sum": total["sum"] + x * part, "last": part}

        rows = list(parts.unbind(0))[::order]
        first = {"sum": x * 0, "last": rows[0]}
        return transforms.fold(step, first, rows, (x,), [microbatch(i) for i in range(len(rows))])["sum"]

    traced = stages.jit(total).trace(ArrayInfo((4,), torch.float64), ArrayInfo((9, 4), torch.float64))
    lowered = traced.lower()
    assert len(called(lowered)) == (8 if order == 1 else 0)
    x, parts = torch.rand(4, dtype=torch.float64), torch.rand(9, 4, dtype=torch.float64)
    assert torch.equal(lowered.compile("eager")(x, parts), total(x, parts))


def test_a_last_microbatch_that_reads_another_result_of_the_one_before_stays_as_it_is():
    def totals(parts):
        def step(total, part):
            return (total[0] + part, total[1] * part - total[1])

        rows = list(parts.unbind(0))
        return transforms.fold(step, (rows[0], rows[1]), rows, (), [microbatch(i) for i in range(len(rows))])

    def crossed(gm, ctx):
        *_, product = [node for node in ir.calls(gm.graph) if node.target is torch.ops.aten.mul.Tensor]
        *_, before, _ = [node for node in ir.calls(gm.graph) if node.target is torch.ops.aten.add.Tensor]
        product.args = (before, product.args[1])
        return gm

    lowered = stages.jit(totals).trace(ArrayInfo((9, 4), torch.float64)).lower(first=[crossed])
    assert len(called(lowered)) == 7
    parts = torch.rand(9, 4, dtype=torch.float64)
    got, sums = lowered.compile("eager")(parts), totals(parts[:8])
    assert torch.equal(got[1], sums[0] * parts[8] - sums[1])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("per_microbatch", [False, True])
def test_what_a_call_hands_on_are_tensors(mesh, per_microbatch):
    """Of what was moved ahead of its microbatch too: compilers return nothing else."""
    cfg = tiny(mesh=mesh, per_microbatch=per_microbatch)
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    (body,) = calls.bodies(lowered.graph_module)
    assert all(isinstance(result.meta["val"], torch.Tensor) for result in ir.results(body.graph))
