"""What GE graphs ask of a device: tasks, streams, time to compile, against what the device and GE have.

Each number is marked: exact, as counted in the graph that torchair makes; bound, at most this; estimate, from figures
that others published. Sources: GE's public sources (hicann/ge: compiler/graph/build/stream, for notifies
AllocMixResource in compiler/engines/nn_engine, for collectives compiler/engines/hccl_engine), CANN's public fusion
passes of Pack, Unpack and Concat, and MindSpore's guide to lazy inlining.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_fn.errors import UserError

STREAMS = 2024  # of 2038 that a 910B has, GE uses so many at most
TASKS_PER_STREAM = 2013  # GE begins a new stream 27 tasks before the 2040 that one holds
TASKS = {"AIV": 3, "HOST": 245}  # of one collective, by HCCL_OP_EXPANSION_MODE: exact, and what an older GE assumed
EVENT_TASKS = 2  # one records and one waits, where work of one stream needs another's
# Of a graph, which may have 1,024: its ops that use both kinds of cores share them. Streams wait by events.
NOTIFIES = 2
GRAPH_BYTES = 2**31 - 1  # that a protobuf holds, and GE is given a graph as one
TENSORS = 63  # that one op of a static shape joins or divides; GE makes as many more as it takes, and one for all
CONST_BYTES_PER_OP = 24  # of shapes and numbers; torchair's graphs have 2 to 24 (tests/npu/test_budget.py)
# Of a model file for each op that leaves work, with the constants and reshapes around it: measured of the graphs that
# torchair makes, 858 to 1,139 (tests/npu/test_budget.py).
_AIR_BYTES_PER_OP = 1000
_FUSED = ("AllGatherMatmul", "MatmulReduceScatter")
# Pangu-13B's 20,000 nodes took GE 20 minutes, its 135,000 nodes about 3 hours.
_NODES, _SECONDS = (20_000, 135_000), (20 * 60, 3 * 3600)
LONG_S = 1800  # longer than this is no time to wait for a graph where pieces compile sooner
_POWER = math.log(_SECONDS[1] / _SECONDS[0]) / math.log(_NODES[1] / _NODES[0])


@dataclass(frozen=True)
class GraphCounts:
    """A GE graph: how often it runs in a step, its ops that leave work for the device by type, and its collectives by
    the stream on which they stand. `wide`: of its ops that join or divide tensors as many as the model has layers or
    the step microbatches, how many each; `computed`: bytes of what depends on no input; `joinable`: how many
    collectives fewer it had if small ones went together, by stream."""

    name: str
    runs: int
    ops: Counter[str]
    collectives: Counter[str] = field(default_factory=Counter)
    wide: tuple[int, ...] = ()
    computed: int = 0
    joinable: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Ops, collectives included."""
        return sum(self.ops.values())

    def tasks(self, per_collective: int) -> dict[str, int]:
        """Tasks by logical stream, "" being that which computes."""
        crossing = EVENT_TASKS * sum(self.collectives.values())
        tasks = {"": self.total - sum(self.collectives.values()) + crossing}
        return tasks | {name: n * (per_collective + EVENT_TASKS) for name, n in self.collectives.items()}

    def streams(self, tasks_per_collective: int) -> dict[str, int]:
        """Physical streams by logical one."""
        return {name: math.ceil(n / TASKS_PER_STREAM) for name, n in self.tasks(tasks_per_collective).items()}

    @property
    def told(self) -> str:
        """In a few words, for a log."""
        few, many = (sum(self.streams(tasks).values()) for tasks in TASKS.values())
        return f"{self.total:,} ops, {sum(self.collectives.values()):,} collectives, {few:,} to {many:,} streams"

    @property
    def events(self) -> int:
        """A bound: each collective waits for its operand, and is waited for. No limit: above 65,500 GE gives one event
        to several places."""
        return 2 * sum(self.collectives.values())

    @property
    def added(self) -> int:
        """Ops that GE adds as it takes apart those that join or divide more than TENSORS."""
        return sum(math.ceil(n / TENSORS) for n in self.wide if n > TENSORS)

    @property
    def constant_bytes(self) -> int:
        """A bound: shapes and numbers, and what GE may compute of them while it compiles, such as masks and angles."""
        return self.total * CONST_BYTES_PER_OP + self.computed

    @property
    def engines(self) -> dict[str, int]:
        """Ops by who runs them: vector and matrix cores, HCCL, or both at once where a product and its collective are
        one op."""
        by = Counter({"cores": 0, "HCCL": 0, "both": 0})
        for kind, n in self.ops.items():
            by["both" if kind in _FUSED else "HCCL" if kind.startswith("Hcom") else "cores"] += n
        return dict(by)

    @property
    def air_bytes(self) -> int:
        """An estimate of the graph as a model file, which takes 2 GB at most, constants included: they are shapes and
        numbers, no weights."""
        return self.total * _AIR_BYTES_PER_OP

    @property
    def compile_s(self) -> float:
        """An estimate, with one thread."""
        return float(_SECONDS[0] * (self.total / _NODES[0]) ** _POWER)


@dataclass(frozen=True)
class Budget:
    """Of the GE graphs of one device, which it holds at the same time. `exact`: ops are counted, not bounded."""

    form: str
    graphs: tuple[GraphCounts, ...]
    exact: bool = True

    @property
    def total(self) -> int:
        """Ops of all graphs."""
        return sum(graph.total for graph in self.graphs)

    @property
    def collectives(self) -> int:
        """Of all graphs."""
        return sum(sum(graph.collectives.values()) for graph in self.graphs)

    def streams(self, mode: str) -> int:
        """Physical streams of all graphs in an expansion mode."""
        return sum(sum(graph.streams(TASKS[mode]).values()) for graph in self.graphs)

    @property
    def compile_s(self) -> float:
        """An estimate, with one thread."""
        return sum(graph.compile_s for graph in self.graphs)

    @property
    def loads(self) -> bool:
        """Whether a device surely has streams enough."""
        return self.streams("HOST") <= STREAMS

    @property
    def passed(self) -> str:
        """The limit that these graphs surely pass, in words; "" for none."""
        if self.streams("AIV") > STREAMS:
            return (
                f"need at least {self.streams('AIV'):,} streams of a device, which has {STREAMS}, with {TASKS['AIV']} "
                f"tasks for a collective, and {self.streams('HOST'):,} with {TASKS['HOST']}"
            )
        largest = max((graph.air_bytes for graph in self.graphs), default=0)
        if largest > GRAPH_BYTES:
            return f"are too large: one takes some {largest / 1e9:.1f} GB of the {GRAPH_BYTES / 1e9:.1f} of a protobuf"
        return ""


def as_lines(budget: Budget) -> list[str]:
    """For people: a line for each graph, and for all together."""
    head = (
        f"{'graph':>14} {'runs':>5} {'ops':>8} {'collectives':>11} {'streams, AIV':>12} {'HOST':>6} {'events':>7} "
        f"{'notifies':>8} {'GE adds':>7} {'MB constants':>12} {'MB of .air':>10} {'min':>6}"
    )
    rows = [
        f"{graph.name or 'step':>14} {graph.runs:5} {graph.total:8,} {sum(graph.collectives.values()):11,} "
        f"{sum(graph.streams(TASKS['AIV']).values()):12,} {sum(graph.streams(TASKS['HOST']).values()):6,} "
        f"{graph.events:7,} {NOTIFIES:8} {graph.added:7,} {graph.constant_bytes / 1e6:12.1f} "
        f"{graph.air_bytes / 1e6:10.1f} {graph.compile_s / 60:6.1f}"
        for graph in budget.graphs
    ]
    share = budget.streams("HOST") / STREAMS
    return [
        f"GE graphs of a device, form {budget.form}: {budget.total:,} ops "
        f"({'exact' if budget.exact else 'at most'}), {budget.streams('AIV'):,} to "
        f"{budget.streams('HOST'):,} of {STREAMS} streams (bounds: {TASKS['AIV']} and {TASKS['HOST']} tasks for a "
        f"collective; at most {share:.1%}), {budget.compile_s / 60:.0f} min to compile with one thread",
        "exact: what GE adds; bounds: streams, events, notifies, constants; estimates: .air, time to compile",
        head,
        *rows,
    ]


def as_json(budget: Budget, why: str) -> dict[str, Any]:
    """The same for programs; `why` this form."""
    return {
        "form": budget.form, "why": why, "compile_s": budget.compile_s, "exact": budget.exact,
        "streams": {mode: budget.streams(mode) for mode in TASKS}, "streams_of_a_device": STREAMS,
        "graphs": [
            {
                "name": g.name, "runs": g.runs, "ops": dict(g.ops), "collectives": dict(g.collectives),
                "engines": g.engines, "events": g.events, "notifies": NOTIFIES, "added": g.added,
                "constant_bytes": g.constant_bytes, "air_bytes": g.air_bytes, "compile_s": g.compile_s,
                "tasks": {mode: g.tasks(TASKS[mode]) for mode in TASKS},
                "streams": {mode: g.streams(TASKS[mode]) for mode in TASKS},
            }
            for g in budget.graphs
        ],
    }  # fmt: skip


def refuse(budget: Budget, most: str, remedies: Sequence[str]) -> None:
    """UserError for graphs that pass a limit, whichever way collectives become tasks, with what takes most of it, and
    what would need how much."""
    if budget.passed:
        raise UserError(
            f"GE graphs of form {budget.form} {budget.passed}. They have {budget.total:,} ops. Most collectives are "
            f"{most}. Instead:\n" + "\n".join(f"  {remedy}" for remedy in remedies)
        )


def advice(budget: Budget, remedies: Sequence[str]) -> str:
    """For graphs that may not load, as HCCL alone knows how many tasks it makes of a collective; "" for others."""
    if budget.loads or budget.passed:
        return ""
    return (
        f"these GE graphs may not load: with {TASKS['HOST']} tasks for a collective they need "
        f"{budget.streams('HOST'):,} streams of a device, which has {STREAMS}. Fewer streams:\n"
        f"  HCCL_OP_EXPANSION_MODE=AIV, where every group is inside of one machine: {budget.streams('AIV'):,} streams\n"
        + "\n".join(f"  {remedy}" for remedy in remedies)
    )
