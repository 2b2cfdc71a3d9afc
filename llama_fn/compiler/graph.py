"""What every stage that is a graph answers: its text, its costs, its memory, and what a notebook shows of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from llama_fn.compiler import cost, ir, liveness, overview


class Graph(ABC):
    """A stage: see stages.py."""

    graph_module: torch.fx.GraphModule

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is of."""

    @property
    def aliases(self) -> Sequence[tuple[int, int]]:
        """(input, result) pairs that the graph itself does not yet write into one buffer."""
        return ()

    def as_text(self, scope: str = "") -> str:
        """The graph; with `scope`, such as layers/0/mlp, its ops alone. ValueError for a scope that no op has."""
        return ir.as_text(self.graph_module, self.title, scope=scope)

    def __str__(self) -> str:
        return self.as_text()

    def __repr__(self) -> str:
        return overview.text(self)

    def _repr_html_(self) -> str:
        return overview.page(self)

    def cost_analysis(self) -> cost.Cost:
        """FLOPs, bytes and ops of one device."""
        return cost.cost_analysis(self.graph_module)

    def memory_analysis(self) -> liveness.Memory:
        """What lives over the ops of one device."""
        return liveness.memory_analysis(self.graph_module, self.aliases)
