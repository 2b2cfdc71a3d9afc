"""A step is compiled in pieces and called in turn: the numbers stay, and so does what may be overwritten and when."""

import operator
import weakref

import pytest
import torch
from test_roll import MESHES, arguments, tiny

from kernels.repeat import call, flat
from kernels.scope_names import microbatch
from llama_fn import compat, tree
from llama_fn.compiler import calls, cost, ir, passes, stages
from llama_fn.compiler.backends import Program, forms, interpret
from llama_fn.compiler.backends.in_turn import in_turn
from llama_fn.compiler.passes.expand import expand
from llama_fn.compiler.passes.in_place import COPY, add_in_place
from llama_fn.compiler.pieces import in_pieces
from llama_fn.model import transforms
from llama_fn.model.arrays import ArrayInfo
from llama_fn.planner import config_stages
from sharding import Mesh
from sharding.simulate import part


def lowered(cfg):
    return config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))


def pieces(gm, expanded=False):
    made = in_pieces(passes.copy_graph(gm))
    return expand(made, {"barrier": "reference"}, forms.find, compat.inductor_decompositions()) if expanded else made


@pytest.mark.parametrize("mesh", MESHES)
def test_pieces_do_what_the_whole_does(mesh):
    cfg = tiny(6, mesh=mesh)
    step = lowered(cfg)
    made = pieces(step.graph_module)
    assert all(calls.is_packing(node) for node in ir.calls(made.graph)), "every op is in a body"
    assert len(calls.bodies(made)) == 3
    ended = []
    for gm in (made, step.graph_module):
        program = Program((gm,), step.mesh, step.inputs, step.outputs, ())
        each = zip(tree.leaves(arguments(cfg)), step.inputs, strict=True)
        given = [part(x, layout, step.mesh, r).clone() for x, layout in each for r in range(step.mesh.size)]
        by_device = [given[r :: step.mesh.size] for r in range(step.mesh.size)]
        results = interpret.Interpreter(program).lockstep(by_device)
        ended.append([*given, *(x for mine in results for x in mine)])
    assert all(map(torch.equal, *ended))


def in_turns(made, watch):
    """`made` with its bodies run op by op; `watch(body, operands, results)` sees every call."""

    def runs(body):
        def run(given):
            operands = list(given)
            given.clear()
            results = list(body(*operands))
            watch(body, operands, results)
            return results

        return run

    return in_turn(made, {body: runs(body) for body in calls.bodies(made)})


def memory_of(body, node):
    """The node whose memory a result lives in."""
    while cost.is_view(node):
        node = node.args[0]
    return node


def test_a_donated_input_is_overwritten_only_where_all_that_read_it_can_be_seen():
    """fp32, data parallel: layers' weights are views of the stacked parameters, which the last part overwrites. The
    first part hands them to the microbatches, and the last part takes them from the parameters itself."""
    cfg = tiny(6, mesh="one")
    step = config_stages.train(cfg).lower(Mesh.parse("data:2"), "dp", without=["bucket"])
    made = pieces(step.graph_module)
    assert any(ir.place_of(op).microbatch == 5 for op in ir.calls(list(calls.bodies(made))[-1].graph)), "the last one"
    views = {}  # of inputs of the step
    for node in ir.calls(made.graph):
        if calls.is_call(node):
            body = calls.body_of(made, node)
            given = dict(zip(ir.placeholders(body.graph), flat(node.args[1:]), strict=False))
            written = {given[ir.placeholders(body.graph)[i]] for i in ir.written(body.graph)}
            assert not [x for x in flat(node.args[1:]) if views.get(x) in written]
        elif node.target is operator.getitem:
            body = calls.body_of(made, node.args[0])
            source = memory_of(body, ir.results(body.graph)[node.args[1]])
            if source.op == "placeholder":
                views[node] = node.args[0].args[1:][ir.placeholders(body.graph).index(source)]
    assert len(views) > 2 * cfg.data.microbatches


def test_gradients_are_added_in_place_from_the_second_microbatch_on():
    cfg = tiny(6)
    step = lowered(cfg)
    made = add_in_place(pieces(step.graph_module, expanded=True))
    body = next(each for each, scope in calls.bodies(made).items() if scope == "microbatch/*")
    memory = []

    def watch(called, operands, results):
        if called is body:
            memory.append([x.data_ptr() for x in results])
            assert all(x.data_ptr() in {y.data_ptr() for y in operands} for x in results)

    flat = [x.clone() for x in tree.leaves(arguments(cfg))]
    results = in_turns(made, watch)(list(flat))
    assert len(memory) == 5 and all(each == memory[0] for each in memory)
    state, *inputs = arguments(cfg)
    after, metrics = step.compile("eager")(state, *inputs)
    assert all(map(torch.equal, results, tree.leaves(metrics)))
    assert all(map(torch.equal, flat, tree.leaves((after, inputs))))


def folded(first, more=lambda total: ()):
    """Nine parts added up, from first(x) on; `more(total)` is what each step returns besides."""

    def fn(x, parts):
        def step(total, part, x):
            return (total[0] + part * x, *more(total[0]))

        rows = list(parts.unbind(0))
        return transforms.fold(step, (first(x), *more(x)), rows, (x,), [microbatch(i) for i in range(9)])

    return stages.jit(fn).trace(ArrayInfo((4,), torch.float64), ArrayInfo((9, 4), torch.float64)).lower(), fn


@pytest.mark.parametrize(
    ("first", "more", "in_place"),
    [
        (lambda x: x * 2, lambda total: (), True),
        (lambda x: x, lambda total: (), True),  # the first call, written out, gives it memory of its own
        (lambda x: x * 2, lambda total: (total,), False),  # read again after it was added to
    ],
)
def test_a_sum_that_somebody_else_reads_is_not_overwritten(first, more, in_place):
    step, fn = folded(first, more)
    made = add_in_place(pieces(step.graph_module, expanded=True))
    ops = [node for body in calls.bodies(made) for node in ir.calls(body.graph)]
    assert any(node.target is COPY for node in ops) == in_place
    x, parts = torch.rand(4, dtype=torch.float64), torch.rand(9, 4, dtype=torch.float64)
    kept = x.clone()
    results = in_turns(made, lambda *_: None)([x, parts])
    assert all(map(torch.equal, results, fn(x, parts))) and torch.equal(x, kept)


def test_what_stands_between_two_rows_of_calls_is_a_piece_too():
    def fn(x, parts):
        def add(total, part, x):
            return total + part * x

        def multiply(total, part, x):
            return total * part - x

        rows, scopes = list(parts.unbind(0)), [microbatch(i) for i in range(9)]
        total = transforms.fold(add, x * 2, rows, (x,), scopes)
        return transforms.fold(multiply, total.cos() + 1, rows, (x,), scopes), total

    traced = stages.jit(fn).trace(ArrayInfo((4,), torch.float64), ArrayInfo((9, 4), torch.float64))
    made = add_in_place(pieces(traced.graph_module, expanded=True))
    assert [node.args[0].target for node in ir.calls(made.graph) if calls.is_call(node)] == [
        "part_0", *["add"] * 9, "part_1", *["multiply"] * 9
    ]  # fmt: skip
    x, parts = torch.rand(4, dtype=torch.float64), torch.rand(9, 4, dtype=torch.float64)
    results = in_turns(made, lambda *_: None)([x, parts])
    assert all(map(torch.equal, results, fn(x, parts)))


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_sum_that_is_asked_for_besides_is_not_overwritten(asked_for):
    made, add = torch.fx.Graph(), torch.fx.Graph()
    x = made.placeholder("x")
    made.output([made.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))])
    total, part = add.placeholder("total"), add.placeholder("part")
    add.output([add.call_function(torch.ops.aten.add.Tensor, (total, part))])
    root = torch.nn.Module()
    for name, graph in (("made", made), ("add", add)):
        root.add_module(name, torch.fx.GraphModule(torch.nn.Module(), graph))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(call, (graph.get_attr("made"), x))
    start = graph.call_function(operator.getitem, (first, 0))
    body = graph.get_attr("add")
    last = graph.call_function(call, (body, graph.call_function(call, (body, [start], x)), x))
    for node in ir.calls(graph):
        node.meta["val"] = (None,)
    graph.output([graph.call_function(operator.getitem, (last, 0)), *([start] if asked_for else [])])
    gm = torch.fx.GraphModule(root, graph)
    want = [each.clone() for each in gm(torch.ones(3))]
    add_in_place(gm)
    assert any(node.target is COPY for node in ir.calls(gm.add.graph)) != asked_for
    gm.add.recompile()
    assert all(map(torch.equal, gm(torch.ones(3)), want))


def test_values_are_let_go_by_the_call_that_reads_them_last():
    step, _ = folded(lambda x: x * 2)
    made = pieces(step.graph_module)
    alive = weakref.WeakSet()
    most = []

    def run(body):
        def counted(given):
            operands = [given.pop() for _ in range(len(given))][::-1]
            results = [x.clone() for x in body(*operands)]
            alive.update(results)
            most.append(len(alive))
            return results

        return counted

    results = in_turn(made, {body: run(body) for body in calls.bodies(made)})([torch.rand(4), torch.rand(9, 4)])
    # A row and a sum go for each sum that is made; at the end there are the last call's two operands and its result.
    assert most[1:] == sorted(most[1:], reverse=True) and most[-1] == 3 and len(results) == 1
