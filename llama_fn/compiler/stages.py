"""The stages of a step: jit -> trace -> lower -> compile, after JAX's.

    jit(step, donate=0)             Wrapped   nothing has happened yet
      .trace(state, batch)          Traced    global shapes, our own small op set, no mesh
      .lower(mesh)                  Lowered   the graph of one device
      .compile("inductor")          Compiled  callable

Each stage is immutable, prints itself (`as_text`) and answers `cost_analysis()` and `memory_analysis()`, or None where
it cannot. A stage keeps what is above it: `compiled.lowered.traced`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llama_fn.compiler.arguments import name_of
from llama_fn.compiler.signature import Signature
from llama_fn.compiler.tracebacks import folded
from llama_fn.compiler.traced import Compiled as Compiled
from llama_fn.compiler.traced import Lowered as Lowered
from llama_fn.compiler.traced import Traced as Traced
from llama_fn.compiler.tracing import trace
from llama_fn.tree import Tree


@dataclass(frozen=True)
class Wrapped:
    """A function that can be traced. Calling it goes through all stages once and keeps the result."""

    fn: Callable[..., Any]
    donate: tuple[int, ...] = ()
    max_traces: int = 1
    backend: str = "inductor"
    _compiled: list[Compiled] = field(default_factory=list, repr=False)
    _traces: list[Signature] = field(default_factory=list, repr=False)

    @property
    def trace_count(self) -> int:
        """How often the function was traced: once per signature."""
        return len(self._traces)

    def trace(self, *args: Tree, **kwargs: Tree) -> Traced:
        """Trace with the shapes and dtypes of the arguments, whose leaves are ArrayInfo, tensors, NumPy arrays or
        numbers.

        ValueError when the function was already traced `max_traces` times: a step that is traced anew in the middle
        of a run is a bug that costs minutes each time.
        """
        name = name_of(self.fn)
        if len(self._traces) >= self.max_traces:
            what = f"{name} (traced {self.trace_count} of {self.max_traces} times)"
            self._traces[-1].leaves(args, kwargs, what)
            raise ValueError(
                f"{name} was already traced for these arguments: keep the Traced and reuse it. After a change of the "
                "model, wrap the step anew: jit(make_train_step(cfg))"
            )
        start = time.perf_counter()
        try:
            gm, signature = trace(self.fn, args, kwargs, self.donate)
        except Exception as error:
            raise folded(error, name) from None
        traced = Traced(name, gm, signature, time.perf_counter() - start)
        self._traces.append(traced.signature)
        return traced

    def __call__(self, *args: Tree, **kwargs: Tree) -> Tree:
        """The function's results, compiled at the first call."""
        if not self._compiled:
            self._compiled.append(self.trace(*args, **kwargs).lower().compile(self.backend))
        return self._compiled[0](*args, **kwargs)


def jit(fn: Callable[..., Any], donate: int | tuple[int, ...] = (), **options: Any) -> Wrapped:
    """Wrap a pure function over trees. The k-th donated argument must have the tree of the k-th result, which then
    lives in the argument's buffers: after the call the old values are gone."""
    return Wrapped(fn, (donate,) if isinstance(donate, int) else tuple(donate), **options)
