"""The dumped GE graphs compute the numbers of the eager step: one, two and four ranks, three steps."""

from __future__ import annotations

import functools

import pytest
import torch
from ge_interpreter import GeInterpreter, run_stages
from jobs import JOBS, config_of

from kernels.repeat import flat
from llama_fn import tree
from llama_fn.compiler import calls, ir
from llama_fn.compiler.backends import Program, interpret
from llama_fn.compiler.backends.in_turn import in_turn
from llama_fn.compiler.pieces import in_pieces
from llama_fn.inspect import dump
from llama_fn.model import arrays, random, train_step
from llama_fn.planner import config_stages
from sharding.simulate import join, part

STEPS = 3


def prepared(name):
    cfg = config_of(JOBS[name])
    traced = config_stages.train(cfg)
    return cfg, traced, config_stages.lower(traced, cfg, config_stages.mesh(cfg)), len(JOBS[name]["ranks"])


def in_form(folder, cfg, lowered, ranks):
    """What runs the GE graphs of all ranks, from inputs per rank to results per rank."""
    folders = [dump.rank_folder(folder, r) for r in range(ranks)]
    if len(lowered.graphs) > 1:
        return of_stages(folder, cfg, lowered)
    if cfg.run.npu_form != "calls":
        return GeInterpreter(folders).run
    gm = in_pieces(lowered.graph_module)
    graphs = {body: GeInterpreter(folders, name) for body, name in ir.subgraphs(gm).items()}

    def run_of(graph):
        def run(given):
            results = graph.run([[values[r] for values in given] for r in range(ranks)])
            return [dict(enumerate(each)) for each in zip(*results, strict=True)]

        return run

    run = in_turn(gm, {body: run_of(graph) for body, graph in graphs.items()})
    return lambda inputs: _by_rank(run([dict(enumerate(each)) for each in zip(*inputs, strict=True)]), ranks)


class GeStage(interpret._Stage):
    """A stage whose bodies are run by their GE graphs. Messages, and what all stages do together, are the
    interpreter's."""

    folder = None

    def __init__(self, *args):
        super().__init__(*args)
        folders = [dump.rank_folder(self.folder, rank) for rank in self.ranks]
        self.ge = {body: GeInterpreter(folders, name, self.ranks) for body, name in ir.subgraphs(self.gm).items()}

    def _call(self, gm, node, values, dying, within):
        given = [torch.fx.node.map_arg(node.args[1:], mine.__getitem__) for mine in values]
        results = self.ge[calls.body_of(gm, node)].run([flat(operands) for operands in given])
        for mine, each in zip(values, results, strict=True):
            mine[node] = tuple(each)
        for dead in dying:
            for mine in values:
                del mine[dead]
        return
        yield


def of_stages(folder, cfg, lowered):
    """Every stage by its own GE graphs."""
    if cfg.run.npu_form == "whole":
        ranks = [
            [r for r in range(lowered.mesh.size) if lowered.of_rank(r).stage == s] for s in range(len(lowered.graphs))
        ]
        stages = [GeInterpreter([dump.rank_folder(folder, r) for r in own], numbers=own) for own in ranks]
        return functools.partial(run_stages, stages)
    graphs = tuple(in_pieces(gm) for gm in lowered.graphs)
    program = Program(graphs, lowered.mesh, lowered.inputs, lowered.outputs, ())
    stage = type("Stage", (GeStage,), {"folder": folder})

    def run(inputs):
        interpreter = interpret.Interpreter(program)
        interpreter.stage = stage
        return interpreter.lockstep(inputs)

    return run


def _by_rank(results, ranks):
    return [[values[r] for values in results] for r in range(ranks)]


def steps_of_ge(folder, cfg, lowered, ranks, random_inputs):
    """Metrics of every step, and the state after the last."""
    ge = in_form(folder, cfg, lowered, ranks)
    leaves, spec = tree.flatten(arrays.materialize(train_step.abstract_state(cfg), random.key(0)))
    layouts, mesh = lowered.inputs[: len(leaves)], lowered.mesh
    held = [[part(x, p, mesh, r) for x, p in zip(leaves, layouts, strict=True)] for r in range(ranks)]
    rows = []
    for i in range(STEPS):
        inputs = list(zip(tree.leaves(random_inputs(cfg, i)), lowered.inputs[len(leaves) :], strict=True))
        results = ge([mine + [part(x, p, mesh, r) for x, p in inputs] for r, mine in enumerate(held)])
        assert all(torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True))
        rows.append(torch.stack(results[0]))
    whole = [
        join([mine[i] for mine in held], p, mesh, x.shape) for i, (x, p) in enumerate(zip(leaves, layouts, strict=True))
    ]
    return torch.stack(rows), tree.unflatten(spec, whole)


def steps_of_eager(traced, cfg, random_inputs):
    step = traced.lower().compile("eager")
    state, rows = arrays.materialize(train_step.abstract_state(cfg), random.key(0)), []
    for i in range(STEPS):
        state, metrics = step(state, *random_inputs(cfg, i))
        rows.append(torch.stack(tree.leaves(metrics)))
    return torch.stack(rows), state


def apart(a, b):
    return float(torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double()).clamp(min=1e-30))


@pytest.mark.parametrize(
    "name",
    [
        "tiny_fp32",
        "tiny_4_ranks",
        "tiny_calls",
        "tiny_pipeline",
        "tiny_segments",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "tiny_2_ranks",
                "tiny_pipeline_whole",
                "tiny_ulysses",
                "tiny_remat",
                "tiny_variants",
            )
        ),
    ],
)
def test_ge_graph_computes_the_step_in_float32(name, lowered, random_inputs):
    cfg, traced, parts, ranks = prepared(name)
    want, want_state = steps_of_eager(traced, cfg, random_inputs)
    got, state = steps_of_ge(lowered[name], cfg, parts, ranks, random_inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for path, a, b in zip(tree.paths(state, "state"), tree.leaves(state), tree.leaves(want_state), strict=True):
        # In the norm: Adam turns the round-off of a gradient near its epsilon into a step of any size.
        second_moment = ".chain[1][1]" in path  # of squares, whose error is twice that of what is squared
        assert apart(a, b) <= (2e-5 if second_moment else 1e-5), path


@pytest.mark.parametrize(
    "name",
    [
        "tiny_fp16_gqa",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tiny_bf16", "tiny_fused", "tiny_pipeline_bf16")),
    ],
)
def test_ge_graph_computes_the_step_to_the_round_off_of_narrow_floats(name, lowered, random_inputs):
    """Half of the digits differ, as the fused ops round at other places: the loss agrees to bfloat16's epsilon."""
    cfg, traced, parts, ranks = prepared(name)
    want, want_state = steps_of_eager(traced, cfg, random_inputs)
    got, state = steps_of_ge(lowered[name], cfg, parts, ranks, random_inputs)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)
    for path, a, b in zip(
        tree.paths(state, "params"), tree.leaves(state.params), tree.leaves(want_state.params), strict=False
    ):
        assert apart(a, b) <= 5e-3, path
