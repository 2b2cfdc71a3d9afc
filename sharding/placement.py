"""On which part of a pipelined model each value of a graph stands, by the scopes of its ops.

    gather/layers/5/wq        with layer 5: part 2
    microbatch/0/layers/5/... the same
    microbatch/0/head         with what it reads: the last part
    microbatch/0/embed        reads nothing that has a place: anywhere

A value that is needed everywhere, as the gradient of the embedding or the loss, is a partial sum over the stages: the
parts that it stands on have its terms, and all others nothing. Parts are numbered in the order of the model
(stages.py).
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from kernels.scope_names import Scope, parse
from sharding.errors import ShardingError, where
from sharding.propagate import ADDITIVE, LIKE_COPY
from sharding.spec import P
from sharding.stages import Stages

aten = torch.ops.aten
PARTS = "parts"  # the label of a node: "2", or "0,3" for a sum with terms on several
ANYWHERE: frozenset[int] = frozenset()


def parts_of(node: torch.fx.Node) -> frozenset[int]:
    """The parts that a node of a per-device graph stands on; none: on any."""
    text = str(node.meta.get("custom", {}).get(PARTS, ""))
    return frozenset(map(int, text.split(","))) if text else ANYWHERE


def label(parts: frozenset[int]) -> dict[str, str]:
    """The labels of a node on these parts."""
    return {PARTS: ",".join(map(str, sorted(parts)))} if parts else {}


class Placement:
    """The parts of the nodes of a traced graph, each known once it has been asked for; without `stages`, anywhere."""

    def __init__(self, stages: Stages | None) -> None:
        self.stages = stages
        self.parts: dict[torch.fx.Node, frozenset[int]] = {}

    def of(self, node: torch.fx.Node, layouts: dict[torch.fx.Node, Any]) -> frozenset[int]:
        """Where a node stands, whose operands were asked for before; ShardingError where they stand apart and it is no
        sum of theirs."""
        if self.stages is None or node.op in ("placeholder", "output"):
            parts = ANYWHERE
        elif node.target is operator.getitem and self._layer(node, layouts) is not None:
            parts = frozenset([self.stages.part_of(self._layer(node, layouts) or 0)])
        else:
            parts = self._of_op(node)
        self.parts[node] = parts
        return parts

    def slot(self, node: torch.fx.Node, layouts: dict[torch.fx.Node, Any]) -> int | None:
        """Of a layer's part of a stacked leaf, its row in what its stage has of that; None for anything else."""
        layer = self._layer(node, layouts)
        return None if layer is None or self.stages is None else self.stages.slot_of(layer)

    def comes_home(self, node: torch.fx.Node) -> bool:
        """Whether an annotation on a value of some parts makes it one of all stages: outside of microbatches, and of
        what is of one layer."""
        scope = _scope(node)
        return bool(self.parts[node.args[0]]) and scope.microbatch is None and scope.layer is None  # type: ignore[index]

    def stacks_layers(self, node: torch.fx.Node) -> bool:
        """Whether a node stacks values of all layers, each where its layer is; ShardingError in another order."""
        if self.stages is None or node.target is not aten.stack.default:
            return False
        stacked: Any = node.args[0]
        each = [self.parts[x] for x in stacked]
        if not any(each):
            return False
        layers = sum(self.stages.sizes)
        if each != [frozenset([self.stages.part_of(i)]) for i in range(layers)]:
            raise ShardingError(
                f"{where(node)}: it stacks values of several stages of the pipeline, which must be one for each of the "
                f"{layers} layers, in their order; they stand on parts {[sorted(parts) for parts in each]}"
            )
        return True

    def _of_op(self, node: torch.fx.Node) -> frozenset[int]:
        assert self.stages is not None
        scope, operands = _scope(node), _operands(node)
        apart = {parts for parts in map(self.parts.__getitem__, operands) if parts}
        if scope.layer is not None:
            try:
                return frozenset([self.stages.part_of(scope.layer)])
            except ValueError as error:
                raise ShardingError(f"{where(node)}: {error}") from None
        if self.stacks_layers(node):
            return ANYWHERE
        if node.target in _ANNOTATIONS:
            return ANYWHERE if self.comes_home(node) else self.parts[operands[0]]
        together = frozenset[int]().union(*apart)
        if (len(apart) > 1 and node.target not in ADDITIVE) or (len(together) > 1 and node.target not in _LINEAR):
            raise ShardingError(
                f"{where(node)}: its operands stand on parts {[sorted(parts) for parts in apart]} of the pipelined "
                "model, and it is neither in the scope of one layer nor a sum. Open named_scope(layer(i)) around what "
                "belongs to a layer, or write constrain(x, P(...)) outside of the microbatches on what all stages need"
            )
        return together

    def _layer(self, node: torch.fx.Node, layouts: dict[torch.fx.Node, Any]) -> int | None:
        """The layer whose part of a stacked leaf a node takes, None for anything else."""
        source: Any = node.args[0] if node.target is operator.getitem else None
        if source is None or source.target is not aten.unbind.int:
            return None
        stacked: P = layouts[source.args[0]]
        return int(node.args[1]) if stacked.blocks else None  # type: ignore[arg-type]


_ANNOTATIONS = (torch.ops.llama_fn.constrain.default, torch.ops.llama_fn.reshard_as.default)
_LINEAR = (*ADDITIVE, *LIKE_COPY)


def _operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    operands: dict[torch.fx.Node, None] = {}
    torch.fx.node.map_arg((node.args, node.kwargs), lambda n: operands.setdefault(n))
    return list(operands)


def _scope(node: torch.fx.Node) -> Scope:
    return parse(str(node.meta.get("custom", {}).get("scope", "")))
