"""Say on which device the graph runs. Traced graphs are written for the CPU; here every value and every op that makes
a tensor from nothing moves to `device`.

    %z = aten.full([], 0.5, device=cpu)   ->   %z = aten.full([], 0.5, device=cuda:0)
"""

from __future__ import annotations

from typing import Any

import torch

from llama_fn import compat
from llama_fn.compiler import ir


def place(gm: torch.fx.GraphModule, device: str) -> torch.fx.GraphModule:
    """`gm`, and the bodies that it calls, with values, and ops that make tensors, on `device`."""
    target = torch.device(device)
    if target.type == "cpu":
        return gm
    world: compat.FakeTensors | None = None

    def moved(value: Any) -> Any:
        nonlocal world
        if isinstance(value, torch.Tensor):
            world = world or compat.FakeTensors.of(value)
            return world.like(value, device)
        return type(value)(moved(v) for v in value) if isinstance(value, (tuple, list)) else value

    for each in (*ir.subgraphs(gm), gm):
        for node in each.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = moved(node.meta["val"])
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": target}
        each.recompile()
    return gm
