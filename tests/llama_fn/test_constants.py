"""The constants pass: one of each, at the top, and nothing that an input reaches or that writes."""

from __future__ import annotations

import torch

from llama_fn.compiler import ir, passes, stages
from llama_fn.compiler.passes.constants import constants
from sharding import Mesh


def masked(x):
    a = x.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), 0.0)
    b = torch.exp(a).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), 0.0)
    return torch.exp(a) + b + torch.arange(4)


def test_constants_are_computed_once_and_activations_stay():
    gm = stages.jit(masked).trace(torch.ones(4, 4)).graph_module
    after = constants(passes.copy_graph(gm), passes.Context(Mesh(), []))
    after.recompile()
    count = lambda g, name: sum(name in str(n.target) for n in ir.calls(g.graph))  # noqa: E731
    assert (count(gm, "triu"), count(after, "triu"), count(after, "ones"), count(after, "arange")) == (2, 1, 1, 1)
    assert count(after, "exp") == 2, "the same op on an input is not merged"
    names = [str(n.target) for n in ir.calls(after.graph)]
    assert max(i for i, n in enumerate(names) if "triu" in n or "arange" in n) < min(
        names.index(n) for n in names if "exp" in n
    )
    x = torch.randn(4, 4)
    assert torch.equal(after(x)[0], masked(x))
