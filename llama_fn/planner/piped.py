"""What a pipeline takes: the programs of its stages, run by the clock instead of by devices.

A piece of work takes what the ops of its body take (streams.py). The order of the schedule and what waits for what give
the rest (pipeline.py): how long a step is, and how long each stage is idle. Layers are alike, so the programs of two
small models, of k and k + 1 layers in each part, give those of any: every number grows by the same from layer to layer.
A few microbatches are enough, too, but for a schedule that keeps what all of them need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.registry import tensor_bytes
from kernels.scope_names import MICROBATCH
from llama_fn.compat import node_value
from llama_fn.compiler import calls, ir, liveness, stages
from llama_fn.config import Config
from llama_fn.errors import UserError
from llama_fn.hardware import Hardware
from llama_fn.model import train_step
from llama_fn.planner import config_stages
from llama_fn.planner.links import bandwidth
from llama_fn.planner.pipeline import Timeline, simulate, stashes
from llama_fn.planner.streams import NOTHING, Spent, spent
from llama_fn.planner.survey import Survey
from llama_fn.planner.survey import spent as surveyed
from sharding import Mesh
from sharding.messages import sends_bytes
from sharding.rules import Rules
from sharding.schedules import Order, Work, order_of
from sharding.stages import PIPE, Stages, stages_of

SMALL = 2  # layers of a part in the smaller of the two programs
BEFORE, AFTER = "before", "after"  # the microbatches


@dataclass(frozen=True)
class StageCosts:
    """Of one stage's program: what its bodies take, by name, and what stands before and after the microbatches; the
    most that lives in each, arguments apart, and where; bytes that a microbatch keeps for its backward; its survey."""

    bodies: dict[str, Spent]
    peaks: dict[str, tuple[float, str]]
    kept: float
    costs: Survey


@dataclass(frozen=True)
class StagePlan:
    """Of one stage and step: its layers, seconds of work and of waiting, and the most that a device takes."""

    layers: int
    busy_s: float
    idle_s: float
    temporary_bytes: int
    peak_at: str
    kept_bytes: int  # for backwards, of all microbatches under way at most


@dataclass(frozen=True)
class PipelinePlan:
    """The simulated step: `timeline` of the microbatches, from `before_s` on; `alone_s`: the step if no sending hides
    behind computing, `one_stream_s`: with one stream for all collectives of a piece of work (streams.py)."""

    timeline: Timeline
    stages: tuple[StagePlan, ...]
    before_s: float
    after_s: float
    message_s: float
    alone_s: float
    one_stream_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.before_s + self.timeline.step_s + self.after_s

    @property
    def slowest(self) -> int:
        """The stage that works longest."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].busy_s)

    @property
    def imbalance(self) -> float:
        """How much longer the slowest stage works than the mean."""
        busy = [stage.busy_s for stage in self.stages]
        return max(busy) * len(busy) / sum(busy) - 1


def refuse(cfg: Config, mesh: Mesh) -> None:
    """UserError for what is not planned."""
    if cfg.mesh.remat == "budget":
        raise UserError(
            "--mesh.remat=budget keeps other values in some layers than in others, and a pipeline is planned from "
            "layers that are alike: take another policy, such as --mesh.remat=full"
        )


def work(cfg: Config, mesh: Mesh) -> tuple[Stages, Order]:
    """The layers of every part, and the order of every stage's work; UserError where they do not go."""
    pipeline, count = config_stages.pipeline(cfg), mesh.extent((PIPE,))
    try:
        held = stages_of(pipeline, count, cfg.model.num_layers)
        return held, order_of(pipeline.schedule, count, cfg.data.microbatches, pipeline.chunks)
    except ValueError as error:
        raise UserError(f"mesh {mesh}: {error}") from None


def small(cfg: Config, held: Stages, layers: int) -> Config:
    """cfg with so many layers in each part."""
    model = replace(cfg.model, num_layers=layers * len(held.sizes))
    microbatches = _few(cfg, held)
    size = cfg.data.global_batch_size // cfg.data.microbatches
    data = replace(cfg.data, microbatches=microbatches, global_batch_size=size * microbatches)
    return replace(cfg, model=model, data=data, mesh=replace(cfg.mesh, stage_layers=""))


def _few(cfg: Config, held: Stages) -> int:
    """As many microbatches as fill the pipeline, so that stages keep as much as they ever do: gpipe keeps all."""
    return cfg.data.microbatches if cfg.mesh.schedule == "gpipe" else min(cfg.data.microbatches, 2 * held.count)


def argument_bytes(cfg: Config, rules: Rules, mesh: Mesh) -> dict[str, int]:
    """Of a device, by path: the same on every stage, as each has room for the layers of the one with most."""
    named = zip(("state", "batch", "hyper"), train_step.abstract_arguments(cfg), strict=True)
    each = [config_stages.local_bytes(infos, name, mesh, rules) for name, infos in named]
    return {path: size for sizes in each for path, size in sizes.items()}


def predicted(
    small: stages.Lowered, larger: stages.Lowered, held: Stages, order: Order, hardware: Hardware, cfg: Config
) -> tuple[PipelinePlan, list[Survey]]:
    """The plan of a pipeline whose parts hold as many layers as `held` says, and a survey of each stage. `small` and
    `larger` have SMALL and SMALL + 1 layers in each part."""
    each = []
    for stage, (a, b) in enumerate(zip(small.by_stage, larger.by_stage, strict=True)):
        more = held.sizes[stage] - SMALL
        # What is stacked has as many rows on every stage.
        padded = held.slots // (len(held.sizes) // held.count) - SMALL
        each.append(_extrapolated(_costs(a, hardware), _costs(b, hardware), more, padded))
    message_s = max(_message_bytes(one) for one in small.by_stage) / bandwidth(PIPE, small.mesh, hardware)

    def timeline(seconds: Callable[[Spent], float]) -> Timeline:
        def takes(stage: int, work: Work) -> float:
            return seconds(each[stage].bodies.get(_name(work, stage, held.count), NOTHING))

        return simulate(order, takes, message_s)

    def around(seconds: Callable[[Spent], float]) -> tuple[float, float]:
        before, after = (max(seconds(one.bodies[name]) for one in each) for name in (BEFORE, AFTER))
        return before, after

    line, in_flight = timeline(lambda spent: spent.elapsed_s), stashes(order)
    before, after = around(lambda spent: spent.elapsed_s)
    plans = [
        StagePlan(
            sum(held.sizes[stage :: held.count]), sum(event.end_s - event.begin_s for event in line.stages[stage]),
            line.idle_s[stage], *_peak(costs), round(costs.kept * in_flight[stage]),
        )
        for stage, costs in enumerate(each)
    ]  # fmt: skip
    alone = before + timeline(lambda spent: spent.compute_s + spent.comms_s).step_s + after
    one = sum(around(lambda spent: spent.one_stream_s)) + timeline(lambda spent: spent.one_stream_s).step_s
    made = PipelinePlan(line, tuple(plans), before, after, message_s, alone, one)
    return made, [_of_all(one.costs, cfg.data.microbatches / _few(cfg, held)) for one in each]


def _of_all(costs: Survey, times: float) -> Survey:
    """A survey whose microbatches stand for so many times as many."""

    def factor(key: tuple[Any, ...]) -> float:
        scope = key[2] if key[0] == "count" else key[1]
        return times if key[0] != "sent" and str(scope).partition("/")[0] == MICROBATCH else 1

    return {key: number * factor(key) for key, number in costs.items()}


def _name(work: Work, stage: int, count: int) -> str:
    """Of a body, as compiler/pipeline/program.py names it."""
    return f"{work.kind.replace(' ', '_')}_{work.chunk * count + stage}"


def _costs(lowered: stages.Lowered, hardware: Hardware) -> StageCosts:
    gm = lowered.graph_module
    nodes = ir.calls(gm.graph)
    at = [i for i, node in enumerate(nodes) if calls.is_call(node)]
    bodies = {
        str(node.args[0].target): spent(calls.body_of(gm, node).graph.nodes, lowered.mesh, hardware)  # type: ignore
        for node in {n.args[0]: n for n in nodes if calls.is_call(n)}.values()
    }
    bodies |= {BEFORE: spent(nodes[: at[0]], lowered.mesh, hardware)}
    bodies |= {AFTER: spent(nodes[at[-1] :], lowered.mesh, hardware)}
    peaks: dict[str, tuple[float, str]] = {}
    for i, moment in enumerate(liveness.moments(gm)):
        name = BEFORE if i < at[0] else AFTER if i > at[-1] else ""
        name = name or (str(moment.node.args[0].target) if calls.is_call(moment.node) else "")  # type: ignore
        if name and moment.bytes >= peaks.get(name, (0, ""))[0]:
            peaks[name] = moment.bytes, moment.at
    return StageCosts(bodies, peaks, _kept(nodes), dict(surveyed(lowered, hardware)))


def _kept(nodes: Iterable[torch.fx.Node]) -> float:
    """Bytes that the forwards of one microbatch keep, the mean over chunks."""
    kept = {}
    for node in nodes:
        source = node.args[0] if node.args and isinstance(node.args[-1], slice) else None
        if isinstance(source, torch.fx.Node) and str(source.args[0]).startswith("forward"):
            kept[str(source.args[0])] = tensor_bytes(node_value(node))
    return sum(kept.values()) / max(len(kept), 1)


def _extrapolated(small: StageCosts, larger: StageCosts, more: int, padded: int) -> StageCosts:
    """With so many layers more in each part than `small` has; `padded`: rows more, outside of microbatches."""

    def beyond(name: str) -> int:
        return (padded if name in (BEFORE, AFTER) else more) - 1

    times = more - 1
    bodies = {name: body.beyond(small.bodies[name], beyond(name)) for name, body in larger.bodies.items()}
    peaks = {
        name: (size + beyond(name) * (size - small.peaks[name][0]), at) for name, (size, at) in larger.peaks.items()
    }
    costs = {key: n + times * (n - small.costs.get(key, n)) for key, n in larger.costs.items()}
    return StageCosts(bodies, peaks, larger.kept + times * (larger.kept - small.kept), costs)


def _peak(costs: StageCosts) -> tuple[int, str]:
    size, at = max(costs.peaks.values())
    return round(size), at


def _message_bytes(lowered: stages.Lowered) -> int:
    """Of the largest message that a stage sends."""
    return max(map(sends_bytes, lowered.graph_module.graph.nodes))
