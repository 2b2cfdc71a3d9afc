"""The global graph of a step and its shardings -> the graph of one device, every collective explicit.

    %y = einsum("btf,fd->btd", %h, %w)     # h sharded over model in f, w too
    %z = constrain(%y, "batch,seq,embed")  # the rules shard seq over model
->
    %y = einsum("btf,fd->btd", %h, %w)     # unreduced over model
    %z = reduce_scatter(%y, "model", 4, 1)

Collectives come from annotations alone, and from the two ops whose vocabulary is sharded; each carries the scope,
phase and source line of what asked for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from kernels.registry import KERNELS, Kernel, of_node
from kernels.vocab_parallel import FINISHED, SHARDED_VOCABULARY
from sharding import propagate, reshard
from sharding.abstract_eval import AbstractEval
from sharding.checks import Names
from sharding.collectives import all_reduce, axes_text, axis_index, own_slice, reduce_scatter
from sharding.errors import ShardingError, local_shape, where
from sharding.mesh import Mesh
from sharding.placement import ANYWHERE, Placement, label
from sharding.rules import Rules
from sharding.spec import P
from sharding.stages import PIPE, Stages

aten = torch.ops.aten


@dataclass(frozen=True)
class Partitioned:
    """The graph of one device, and how its inputs and outputs are sharded."""

    graph: torch.fx.Graph
    inputs: tuple[P, ...]
    outputs: tuple[P, ...]


def partition(
    gm: torch.fx.GraphModule, mesh: Mesh, rules: Rules, inputs: Sequence[tuple[tuple[str | None, ...], str]],
    stages: Stages | None = None,
) -> Partitioned:  # fmt: skip
    """`inputs`: logical axes and table of every placeholder. ShardingError where annotations are missing or wrong.

    With `stages` the graph has the ops of all of them, labelled by the parts of the model that they belong to
    (placement.py), and is yet to be cut.
    """
    return _Partitioner(gm, mesh, rules, stages).run(inputs)


Layouts = Any  # P of a single result, a list of them of several


class _Partitioner:
    def __init__(self, gm: torch.fx.GraphModule, mesh: Mesh, rules: Rules, stages: Stages | None) -> None:
        self.source, self.mesh, self.rules = gm, mesh, rules
        self.graph = torch.fx.Graph()
        self.new: dict[torch.fx.Node, torch.fx.Node] = {}
        self.layouts: dict[torch.fx.Node, Layouts] = {}
        self.values = AbstractEval.of(next(iter(gm.graph.nodes)).meta["val"])
        self.names = Names(mesh, rules, ())
        self.placement, self.here = Placement(stages), ANYWHERE  # `here`: of the nodes that are being emitted
        self.at: torch.fx.Node = next(iter(gm.graph.nodes))  # the traced node that is being carried over

    def run(self, inputs: Sequence[tuple[tuple[str | None, ...], str]]) -> Partitioned:
        places = iter(inputs)
        self.names = Names(self.mesh, self.rules, (axis for axes, _ in inputs for axis in axes if axis))
        for node in self.source.graph.nodes:
            self.at, self.here = node, self.placement.of(node, self.layouts)
            if node.op == "placeholder":
                self._placeholder(node, *next(places))
            elif node.op == "output":
                outputs = self._output(node)
                continue
            else:
                self.new[node], self.layouts[node] = self._call(node)
                self.new[node].meta["sharding"] = _spec_text(self.layouts[node])
            layouts = self.layouts[node]
            for layout in layouts if isinstance(layouts, list) else [layouts]:
                self.names.layout(layout)
        self.names.finish()
        given = tuple(self.layouts[n] for n in self.source.graph.nodes if n.op == "placeholder")
        return Partitioned(self.graph, given, outputs)

    def _placeholder(self, node: torch.fx.Node, axes: tuple[str | None, ...], table: str) -> None:
        value = node.meta["val"]
        layout = self.rules.layout(axes or (None,) * value.dim(), table, self.mesh)
        shape = local_shape(tuple(value.shape), layout, self.mesh, node.meta.get("path", node.name), table != "compute")
        new = self.graph.node_copy(node, self.new.__getitem__)
        new.meta = {**node.meta, "val": value.new_empty(shape), "sharding": _spec_text(layout)}
        self.new[node], self.layouts[node] = new, layout

    def _output(self, node: torch.fx.Node) -> tuple[P, ...]:
        results: Any = node.args[0]
        for result, path in zip(results, node.meta.get("paths") or [""] * len(results), strict=True):
            if self.placement.parts[result]:
                raise ShardingError(
                    f"result {path} stands on one stage of the pipeline only, made by {where(result)}. Write "
                    "constrain(x, P(...)) on it, outside of the microbatches"
                )
            if self.layouts[result].unreduced:
                raise ShardingError(
                    f"result {path} is still a partial sum over {sorted(self.layouts[result].unreduced)}, made by "
                    f"{where(result)}. Write constrain(x, P(...)) on it"
                )
        new = self.graph.node_copy(node, self.new.__getitem__)
        new.meta = dict(node.meta)
        return tuple(self.layouts[result] for result in results)

    def _call(self, node: torch.fx.Node) -> tuple[torch.fx.Node, Layouts]:
        kernel, args = of_node(node.target), cast("tuple[Any, ...]", node.args)
        if node.target is operator.getitem:
            source, index = args
            slot = self.placement.slot(node, self.layouts)
            new = self._copy(node) if slot is None else self.emit(operator.getitem, self.new[source], slot)
            return new, self.layouts[source][index]
        if self.placement.stacks_layers(node):
            return self._stack_layers(args[0]), self._aten_layout(node)
        if kernel is None:
            layout = self._aten_layout(node)  # first: shapes that do not fit are an error of torch's, without a line
            return self._copy(node), layout
        if kernel.name == "constrain":
            x, spec, table = args
            axes = tuple(None if a == "-" else a for a in str(spec).split(",")) if spec else ()
            self.names.annotation(axes, where(node))
            target = self.rules.layout(axes, str(table), self.mesh)
            what = f"{_origin(x)}{where(node)}"
            if self.here and PIPE in {axis for axes in target.by_dim for axis in axes}:
                raise ShardingError(
                    f"{what}: a value of one stage of the pipeline cannot be sharded over all of them inside of a "
                    "microbatch or a layer. Write the annotation outside of them"
                )
            local_shape(tuple(x.meta["val"].shape), target, self.mesh, what, table != "compute")
            return self._reshard(x, target)
        if kernel.name == "checkpoint_name":
            x, name = args
            self.new[x].meta["custom"] = {**self.new[x].meta.get("custom", {}), "name": name}
            return self.new[x], self.layouts[x]
        if kernel.name == "reshard_as":
            x, like = args
            return self._reshard(x, P.of(self.layouts[like].by_dim, blocks=self.layouts[like].blocks))
        return self._kernel(node, kernel)

    def _kernel(self, node: torch.fx.Node, kernel: Kernel) -> tuple[torch.fx.Node, Layouts]:
        args = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args]
        operands = [a for a in node.args if isinstance(a, torch.fx.Node)]
        layouts = [self.layouts[a] for a in operands]
        form: Any = SHARDED_VOCABULARY.get(kernel.name)
        factors = kernel.factors(*args)
        results = propagate.by_factors(node, kernel, args, layouts, parts="v" if form else "")
        axes = self._vocabulary(factors.operands, layouts) if form else ()
        if axes:
            new = form(_Emitter(self, axes, self.new[operands[0]]), *(self._arg(a) for a in node.args))
            if kernel.name in FINISHED:
                results = [P.of(r.by_dim, r.unreduced - set(axes)) for r in results]
        else:
            new = self._copy(node)
        several = isinstance(node.meta["val"], (tuple, list))
        return new, results if several else results[0]

    @staticmethod
    def _vocabulary(operands: Sequence[tuple[str, ...]], layouts: list[P]) -> tuple[str, ...]:
        for letters, layout in zip(operands, layouts, strict=True):
            if "v" in letters:
                return layout.axes(letters.index("v"))
        return ()

    def _aten_layout(self, node: torch.fx.Node) -> Layouts:
        operands: list[torch.fx.Node] = []
        torch.fx.node.map_arg((node.args, node.kwargs), operands.append)
        layouts = [self.layouts[n] for n in operands]
        if node.target is aten.sum.default:
            return propagate.reduction(node, layouts[0], None, False)
        if node.target is aten.sum.dim_IntList:
            return propagate.reduction(node, layouts[0], node.args[1], len(node.args) > 2 and bool(node.args[2]))  # type: ignore[arg-type]
        if node.target is aten.stack.default:
            one = propagate.together(node, layouts)
            if self.placement.stacks_layers(node):
                return P.of([(PIPE,), *one.by_dim], one.unreduced, self.rules.blocks)
            return P.of([(), *one.by_dim], one.unreduced)
        if node.target is aten.unbind.int:
            if layouts[0].axes(0) and not layouts[0].blocks:
                raise ShardingError(
                    f"{where(node)}: the first dimension is taken apart and must be whole: {layouts[0]}"
                )
            part = P.of(layouts[0].by_dim[1:], layouts[0].unreduced)
            return [part] * len(node.meta["val"])
        if node.target is aten.permute.default:
            dims: list[int] = node.args[1]  # type: ignore[assignment]
            return P.of([layouts[0].by_dim[dim] for dim in dims], layouts[0].unreduced)
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if pointwise or node.target in (*propagate.LIKE_COPY, *propagate.SHAPE_ONLY):
            shapes = [tuple(n.meta["val"].shape) for n in operands]
            return propagate.pointwise(node, shapes, layouts, tuple(node.meta["val"].shape))
        if all(not layout.unreduced and not any(layout.by_dim) for layout in layouts):
            value = node.meta["val"]
            whole = [P(*[None] * v.dim()) for v in (value if isinstance(value, (tuple, list)) else [value])]
            return whole if isinstance(value, (tuple, list)) else whole[0]
        raise ShardingError(
            f"{where(node)}: no sharding rule for this op and an operand is sharded ({layouts}). Write it with the ops "
            "of kernels/, or constrain its operands to be whole"
        )

    def _reshard(self, x: Any, target: P) -> tuple[torch.fx.Node, P]:
        new, layout = self.new[x], self.layouts[x]
        if self.placement.parts[x] and not self.here:  # what all stages need: the terms of some
            layout = P.of(layout.by_dim, {*layout.unreduced, PIPE})
        for op, axes, args in reshard.steps(layout, target, self.mesh):
            n = self.mesh.extent(axes)
            if op in (reduce_scatter.op, own_slice.op):
                new = self._padded(new, args[0], n)
            new = self.emit(op, new, axes_text(axes), n, *args)
        for dim, size in enumerate(local_shape(tuple(x.meta["val"].shape), target, self.mesh, "", padded=True)):
            if new.meta["val"].shape[dim] > size:
                new = self.emit(aten.clone.default, self.emit(aten.slice.Tensor, new, dim, 0, size))
        return new, target

    def _padded(self, x: torch.fx.Node, dim: int, n: int) -> torch.fx.Node:
        """Zeros after the end of `dim`, where n devices do not divide it."""
        value = x.meta["val"]
        missing = -value.shape[dim] % n
        if not missing:
            return x
        pads = [0, 0] * (value.dim() - dim - 1) + [0, missing]
        return self.emit(aten.constant_pad_nd.default, x, pads)

    def _stack_layers(self, parts: Sequence[torch.fx.Node]) -> torch.fx.Node:
        """The stack of what all layers have, of which each stage will stack its own (llama_fn/compiler/pipeline)."""
        own = [self.new[part] for part in parts]
        new = self.emit(aten.stack.default, own[:1])
        assert self.placement.stages is not None
        new.meta["val"] = self.values.result(aten.stack.default, ([own[0]] * self.placement.stages.slots,))
        new.args = (own,)
        return new

    def _arg(self, a: Any) -> Any:
        return torch.fx.node.map_arg(a, self.new.__getitem__)

    def _copy(self, node: torch.fx.Node) -> torch.fx.Node:
        return self.emit(node.target, *self._arg(node.args), **self._arg(node.kwargs))

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A node of the per-device graph, labelled as the traced node that asked for it."""
        new = self.graph.call_function(target, args, kwargs)
        if self.mesh.size == 1:
            value = self.at.meta["val"]  # shapes are the global ones
        else:
            value = self.values.result(target, args, kwargs)
        new.meta = {"val": value, "custom": {**self.at.meta.get("custom", {}), **label(self.here)}}
        return new


def _spec_text(layout: Layouts) -> str:
    """Of one result, or of several."""
    return "; ".join(map(str, layout)) if isinstance(layout, list) else str(layout)


def _origin(node: torch.fx.Node) -> str:
    """The input that a value was cut or cast from, to begin an error with; "" for what is computed."""
    while node.op == "call_function" and node.target in (operator.getitem, aten.unbind.int, aten._to_copy.default):
        node = node.args[0]  # type: ignore[assignment]
    return f"{node.meta.get('path', node.name)}: " if node.op == "placeholder" else ""


class _Emitter:
    """Emits the sharded form of one op; see kernels.vocab_parallel.Emit."""

    def __init__(self, partitioner: _Partitioner, axes: tuple[str, ...], like: torch.fx.Node) -> None:
        self.partitioner, self.axes = partitioner, axes
        self.index = partitioner.emit(axis_index.op, like, axes_text(axes))

    def __call__(self, op: Any, *args: Any) -> Any:
        return self.partitioner.emit(op, *args)

    def all_reduce(self, x: Any, kind: str) -> Any:
        n = self.partitioner.mesh.extent(self.axes)
        return self.partitioner.emit(all_reduce.op, x, axes_text(self.axes), n, kind)


assert set(SHARDED_VOCABULARY) <= set(KERNELS)
