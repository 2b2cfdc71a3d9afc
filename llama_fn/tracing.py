"""From a function of trees to the graph of its flat leaves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama_fn import compat, ir, passes, tree
from llama_fn.arrays import abstract
from llama_fn.garbage import uncollected
from llama_fn.signature import Signature, argument_paths
from sharding.mesh import Mesh


@uncollected()
def trace(
    fn: Callable[..., Any], args: Sequence[Any], donate: tuple[int, ...]
) -> tuple[torch.fx.GraphModule, Signature]:
    """The graph of `fn(*args)`, whose leaves are ArrayInfo or tensors, and its signature; ValueError where it uses
    tensors that are not among its arguments, or where no result takes a donated buffer."""
    names = tuple(list(inspect.signature(fn).parameters)[: len(args)])
    leaves, in_spec = tree.flatten(tuple(args))
    infos = tuple(abstract(x) for x in leaves)
    world = compat.FakeTensors()
    out: dict[str, Any] = {}

    def flat_fn(*flat: torch.Tensor) -> list[torch.Tensor]:
        result = fn(*tree.unflatten(in_spec, flat))
        out["paths"] = tuple(tree.paths(result, "out"))
        flat_out, out["spec"] = tree.flatten(result)
        return flat_out

    gm = world.trace(flat_fn, [world.make(info.shape, info.dtype) for info in infos])
    signature = Signature(in_spec, tuple(argument_paths(args, names)), infos, out["spec"], out["paths"], donate, names)
    _refuse_constants(gm, fn.__name__)
    _name_placeholders(gm, signature.in_paths)
    ir.output_node(gm.graph).meta["paths"] = signature.out_paths
    signature.check_donation(ir.results(gm.graph))
    return passes.run(passes.TRACING, gm, passes.Context(Mesh(), [])), signature


def _refuse_constants(gm: torch.fx.GraphModule, name: str) -> None:
    baked = [node.target for node in gm.graph.nodes if node.op == "get_attr"]
    if baked:
        raise ValueError(
            f"{name} uses tensors that are not among its arguments ({len(baked)} of them: {baked[:3]}); tracing would "
            "freeze their present values into the graph. Pass them as arguments."
        )


def _name_placeholders(gm: torch.fx.GraphModule, paths: Sequence[str]) -> None:
    for node, path in zip(ir.placeholders(gm.graph), paths, strict=True):
        node.meta["path"] = path
        node._rename(path.replace(".", "_").replace("[", "_").replace("]", ""))
    gm.recompile()
