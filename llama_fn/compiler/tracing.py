"""From a function of trees to the graph of its flat leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llama_fn import compat, tree
from llama_fn.compiler import calls, ir, passes
from llama_fn.compiler.arguments import Leaves, bind, name_of
from llama_fn.compiler.garbage import uncollected
from llama_fn.compiler.signature import Signature
from llama_fn.model.arrays import abstract
from llama_fn.tree import Leaf, Tree
from sharding.mesh import Mesh


@uncollected()
def trace(
    fn: Callable[..., Any], args: Sequence[Tree], kwargs: Mapping[str, Tree], donate: tuple[int, ...]
) -> tuple[torch.fx.GraphModule, Signature]:
    """The graph of `fn(*args, **kwargs)`, whose leaves are ArrayInfo or arrays, and its signature; ValueError where it
    uses tensors that are not among its arguments, draws random numbers, returns what is no tensor, or where no result
    takes a donated buffer."""
    bound = bind(fn, args, kwargs)
    leaves = Leaves.of(bound.names, bound.values)
    infos = tuple(abstract(x) for x in leaves.arrays)
    world = compat.FakeTensors()
    out: dict[str, Any] = {}

    def flat_fn(*flat: torch.Tensor) -> list[torch.Tensor]:
        result = bound.call(fn, tree.unflatten(leaves.spec, flat))
        out["paths"] = tuple(tree.paths(result, "out"))
        flat_out, out["spec"] = tree.flatten(result)
        _refuse_other_results(flat_out, out["paths"], name_of(fn))
        return flat_out

    inputs = [world.make(info.shape, info.dtype) for info in infos]
    gm = world.trace(flat_fn, inputs)
    _refuse_random(gm, name_of(fn))
    once = calls.called_once(gm)
    gm = calls.inlined(gm, lambda body: body in once or compat.is_inlined(body))
    paths = tuple(leaves.paths)
    signature = Signature(
        leaves.spec, paths, infos, out["spec"], out["paths"], _donated(bound.names, donate), bound.names
    )
    _refuse_constants(gm, name_of(fn))
    _name_placeholders(gm, signature.in_paths)
    ir.output_node(gm.graph).meta["paths"] = signature.out_paths
    signature.check_donation(ir.results(gm.graph))
    return passes.run(passes.TRACING, gm, passes.Context(Mesh(), [])), signature


def _donated(names: Sequence[str], donate: tuple[int, ...]) -> tuple[int, ...]:
    for position in donate:
        if not 0 <= position < len(names):
            raise ValueError(
                f"donate={position}: there are {len(names)} arguments ({', '.join(names)}), counted from 0"
            )
    return donate


def _refuse_other_results(results: Sequence[Leaf], paths: Sequence[str], name: str) -> None:
    for result, path in zip(results, paths, strict=True):
        if not isinstance(result, torch.Tensor):
            raise ValueError(
                f"{name} returns a {type(result).__name__} as {path}. A traced function returns tensors and trees of "
                "them; keep what is known beforehand outside of it"
            )


def _is_random(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def _refuse_random(gm: torch.fx.GraphModule, name: str) -> None:
    drawn = [node for node, _ in calls.counted(gm) if _is_random(node.target)]
    if drawn:
        line = compat.labels(drawn[0]).get("source", "")
        raise ValueError(
            f"{name} draws random numbers ({drawn[0].target}, {line}). A step takes none, so that the same state and "
            "batch give the same numbers on every backend. Draw them outside and pass them as an argument"
        )


def _refuse_constants(gm: torch.fx.GraphModule, name: str) -> None:
    bodies = dict(gm.named_children())
    baked = [node.target for node in gm.graph.nodes if node.op == "get_attr" and node.target not in bodies]
    if baked:
        raise ValueError(
            f"{name} uses tensors that are not among its arguments ({len(baked)} of them: {baked[:3]}); tracing would "
            "freeze their present values into the graph. Pass them as arguments, and make small constants of "
            "torch.full, torch.arange and the like instead of torch.tensor"
        )


def _name_placeholders(gm: torch.fx.GraphModule, paths: Sequence[str]) -> None:
    for node, path in zip(ir.placeholders(gm.graph), paths, strict=True):
        node.meta["path"] = path
        node._rename(path.replace(".", "_").replace("[", "_").replace("]", ""))
    gm.recompile()
