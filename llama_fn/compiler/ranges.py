"""Ranges of a profile that carry our scopes: which part of the program the device works on at a time.

A range is named by its scope and phase, layers and microbatches taken together. The name begins with the innermost
part, as a viewer cuts names off at the end: "mlp < layers/* < microbatch/* (forward)". A kernel that a compiler fused
out of several scopes names each with its share of the bytes: "a (forward) 70%, b (forward) 30%". A layer that is a
subgraph has a range of its own around those of its ops ("layers/3 (forward)"). Backends and the code that they generate
say where they are; nothing is recorded unless a profiler runs.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from kernels.scope_names import inside_out, outside_in, without_numbers
from llama_fn.compiler import calls, cost, ir

Key = tuple[str, str]  # scope and phase, layers and microbatches taken together
_NAME = re.compile(rf"([^,]+) \(({'|'.join(ir.PHASES)})\)(?: (\d+)%)?")


class Ranges:
    """`to(name)` ends the open range of this level and begins another; `enter` and `leave` go a level down and up."""

    def __init__(self) -> None:
        self.on = False
        self.timer: Callable[[str], AbstractContextManager[Any]] = torch.profiler.record_function
        self._levels: list[tuple[str, AbstractContextManager[Any]] | None] = [None]

    def to(self, name: str) -> None:
        """End the range of this level and begin the one of this name, if it is another; "" begins none."""
        if not self.on:
            return
        here = self._levels[-1]
        if here is not None and here[0] == name:
            return
        if here is not None:
            here[1].__exit__(None, None, None)
        self._levels[-1] = None
        if name:
            timer = self.timer(name)
            timer.__enter__()
            self._levels[-1] = name, timer

    def enter(self, name: str) -> None:
        """Begin the range `name` and, inside it, a level of its own."""
        if self.on:
            self.to(name)
            self._levels.append(None)

    def leave(self) -> None:
        """End the level that `enter` began, and its range."""
        if self.on:
            self.to("")
            self._levels.pop()
            self.to("")


RANGES = Ranges()  # of this process, whose device runs one step at a time


class Timeline:
    """Times the ranges and nothing else, in the place of a torch.profiler.profile.

    For processes that talk over gloo: there torch's profiler (2.13) corrupts memory now and then, as gloo's threads end
    the records that the thread of the step has begun.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def start(self) -> None:
        """Time ranges with this clock from now on."""
        RANGES.timer = self._timed

    def stop(self) -> None:
        """Give ranges back to torch's profiler."""
        RANGES.timer = torch.profiler.record_function

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = time.perf_counter_ns()
        try:
            yield
        finally:
            us = (time.perf_counter_ns() - begun) / 1e3
            self.events.append(range_event(name, begun / 1e3, us))

    def export_chrome_trace(self, path: str) -> None:
        """Write the ranges as a trace that Perfetto opens."""
        with open(path, "w") as f:
            json.dump({"traceEvents": self.events}, f)


def range_event(name: str, begin: float, us: float) -> dict[str, Any]:
    """A range as Chrome's traces have it, times in microseconds."""
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": begin, "dur": us, "pid": os.getpid(), "tid": 0}


def name_of(node: torch.fx.Node, within: str = "") -> str:
    """The range of an op that runs by itself, in a body that is called in the scope `within`."""
    return title(without_numbers(calls.joined(within, ir.scope_of(node))), ir.phase_of(node))


def title(scope: str, phase: str) -> str:
    """The range of a scope in a phase."""
    return f"{inside_out(scope)} ({phase})"


def of_call(node: torch.fx.Node) -> str:
    """The range of a subgraph's call: a layer with its number."""
    return title(ir.scope_of(node), ir.phase_of(node))


def shared_name(nodes: Iterable[torch.fx.Node]) -> str:
    """The range of a kernel that does the work of several ops."""
    bytes_of: dict[str, int] = defaultdict(int)
    for node in nodes:
        bytes_of[name_of(node)] += max(1, cost.moved(node))
    whole = sum(bytes_of.values())
    shares = {name: round(100 * part / whole) for name, part in bytes_of.items()}
    named = [name for name, share in shares.items() if share] or list(shares)[:1]
    return named[0] if len(named) == 1 else ", ".join(f"{name} {shares[name]}%" for name in named)


def shares_of(name: str) -> dict[Key, float]:
    """What each scope has of a range, together 1; {} for a range of somebody else."""
    terms = [_NAME.fullmatch(term) for term in name.split(", ")]
    if not all(terms):
        return {}
    parts: dict[Key, float] = defaultdict(float)
    for term in terms:
        inside, phase, share = term.groups()  # type: ignore[union-attr]
        parts[without_numbers(outside_in(inside)), phase] += float(share or 100)
    whole = sum(parts.values())
    return {key: part / whole for key, part in parts.items()}
