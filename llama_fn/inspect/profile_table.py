"""Predicted against measured, per scope: what a profile's ranges took, beside the roofline of the lowered graph.

A trace is read as written (Chrome's JSON). On a CPU a range's own time counts, that of ranges inside it apart; on a GPU
the kernels launched while it was open; on an NPU, whose step is one launch, the kernels by the names that the GE graph
gives its ops (kernel_details.csv of torch_npu.profiler).
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_fn.compiler import stages
from llama_fn.compiler.ranges import Key, range_event, shares_of
from llama_fn.hardware import Hardware
from llama_fn.planner import plan

Event = Mapping[str, Any]
Kernel = tuple[str, float, float]  # range, begin and duration in microseconds
ELSEWHERE: Key = ("outside of every scope", "")


@dataclass(frozen=True)
class Row:
    """Milliseconds of one step that one device spends in a scope; `predicted` if computing, memory and sending hide
    one another, with the longest of the three in `bound`."""

    scope: str
    phase: str
    measured_ms: float
    predicted_ms: float
    bound: str


def rows(measured: Mapping[Key, float], lowered: stages.Lowered, hardware: Hardware) -> list[Row]:
    """The longest first. `measured` in seconds per step."""
    costs = {(cost.scope, cost.phase): cost for cost in plan.scope_costs(lowered, hardware)}
    compared = []
    for key in dict.fromkeys([*measured, *costs]):
        cost = costs.get(key)
        predicted = cost.seconds if cost else 0.0
        if measured.get(key, 0.0) or predicted:
            bound = cost.bound if cost and predicted else ""
            compared.append(Row(*key, measured.get(key, 0.0) * 1e3, predicted * 1e3, bound))
    return sorted(compared, key=lambda row: (-row.measured_ms, -row.predicted_ms))


def as_text(rows: Sequence[Row], hardware: Hardware) -> str:
    """The table of docs/debugging.md, in milliseconds per step."""
    lines = [
        "milliseconds of a step by scope, measured, and predicted by the roofline, every op reading and writing memory",
        f"{'measured':>10} {'predicted':>10} {'ratio':>6}  {'bound':13}  {'phase':9}  scope",
    ]
    for row in [*rows, Row("all", "", sum(r.measured_ms for r in rows), sum(r.predicted_ms for r in rows), "")]:
        ratio = f"{row.measured_ms / row.predicted_ms:6.2f}" if row.predicted_ms >= 1e-3 else f"{'':6}"
        numbers = f"{row.measured_ms:10.3f} {row.predicted_ms:10.3f} {ratio}"
        lines.append(f"{numbers}  {row.bound:13}  {row.phase:9}  {row.scope}")
    return "\n".join([*lines, f"predicted for {hardware.name}: {hardware.source}"]) + "\n"


def of_trace(events: Iterable[Event], steps: int) -> dict[Key, float]:
    """Seconds per step and scope of a Chrome trace: of its device's kernels where it has any, else of its ranges."""
    timed = [e for e in events if e.get("ph") == "X"]
    ranges = [e for e in timed if e.get("cat") == "user_annotation" and shares_of(e["name"])]
    kernels = [e for e in timed if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return _by_scope(_launched(ranges, kernels, timed) if kernels else _own_time(ranges), steps)


def kernel_details(folder: Path, scopes: Mapping[str, str]) -> list[Kernel]:
    """The kernels in the files of torch_npu.profiler below `folder`, in their order; `scopes` names the range of each
    GE op. A kernel that GE made of several ops has a name of its own and no range."""
    kernels = []
    for path in sorted(folder.rglob("kernel_details.csv")):
        with path.open(newline="") as f:
            for line in csv.DictReader(f):
                begin, us = float(line["Start Time(us)"]), float(line["Duration(us)"])
                kernels.append((scopes.get(line["Name"], ""), begin, us))
    return sorted(kernels, key=lambda kernel: kernel[1])


def of_kernels(kernels: Iterable[Kernel], steps: int) -> dict[Key, float]:
    """Seconds per step and scope."""
    return _by_scope(((name, us) for name, _, us in kernels), steps)


def as_trace(kernels: Iterable[Kernel]) -> dict[str, Any]:
    """A Chrome trace of ranges: kernels of one scope that follow one another are one."""
    events: list[dict[str, Any]] = []
    for name, begin, us in kernels:
        if events and events[-1]["name"] == name:
            events[-1]["dur"] = begin + us - events[-1]["ts"]
        else:
            events.append(range_event(name, begin, us))
    return {"traceEvents": [event for event in events if event["name"]]}


def _by_scope(durations: Iterable[tuple[str, float]], steps: int) -> dict[Key, float]:
    seconds: dict[Key, float] = defaultdict(float)
    for name, us in durations:
        for key, share in (shares_of(name) or {ELSEWHERE: 1.0}).items():
            seconds[key] += us * share / 1e6 / steps
    return dict(seconds)


def _own_time(ranges: Iterable[Event]) -> list[tuple[str, float]]:
    """Microseconds of each range without those of the ranges inside it."""
    own: list[list[Any]] = []
    open_: dict[Any, list[tuple[float, list[Any]]]] = defaultdict(list)  # by thread: ends of the ranges around
    for e in sorted(ranges, key=lambda e: (e["ts"], -e["dur"])):
        around = open_[e["tid"]]
        while around and around[-1][0] <= e["ts"]:
            around.pop()
        if around:
            around[-1][1][1] -= e["dur"]
        own.append([e["name"], e["dur"]])
        around.append((e["ts"] + e["dur"], own[-1]))
    return [(name, us) for name, us in own]


def _launched(ranges: Iterable[Event], kernels: Iterable[Event], events: Iterable[Event]) -> list[tuple[str, float]]:
    """Each kernel with the innermost range that was open on its host thread when it was launched."""
    launches = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e["args"]]
    around: dict[int, str] = {}  # name of a range by correlation
    for thread in {e["tid"] for e in launches}:
        begun = sorted((e for e in ranges if e["tid"] == thread), key=lambda e: (-e["ts"], e["dur"]))
        open_: list[Event] = []
        for launch in sorted((e for e in launches if e["tid"] == thread), key=lambda e: e["ts"]):
            while begun and begun[-1]["ts"] <= launch["ts"]:
                open_.append(begun.pop())
            open_ = [e for e in open_ if e["ts"] + e["dur"] >= launch["ts"]]
            around[launch["args"]["correlation"]] = open_[-1]["name"] if open_ else ""
    return [(around.get(kernel["args"].get("correlation"), ""), kernel["dur"]) for kernel in kernels]
