"""The program of one stage of a pipeline: what stands before the microbatches, its work in the order of the schedule
with messages in between, and what stands after.

    %w0 = all_gather(...)                            # weights of this stage's layers
    %z0 = zeros_like(...)                            # sums over microbatches begin with nothing
    %r0 = receive([4, 128], .., -1, 0)               # asked for one piece of work ahead
    %x0 = received(%r0, ..)
    %f0 = call(%forward_1, %x0, %shared)             # microbatch/0
    %s0 = send(%f0[0], "pipe", 4, 1, 4)
    ...
    %b0 = call(%backward_1, %dy0, %f0[1:], %z, %shared)
    ...
    %n = all_reduce(%norm, "pipe+data+model", ..)    # as on every other stage
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kernels.repeat import call, group
from kernels.scope_names import microbatch
from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.compiler.pipeline.cut import Body, Cut
from sharding.abstract_eval import AbstractEval
from sharding.messages import over_stages, receive, received, send
from sharding.placement import parts_of
from sharding.schedules import FORWARD, Work
from sharding.stages import PIPE, Stages

Node = torch.fx.Node
aten = torch.ops.aten


def program(
    gm: torch.fx.GraphModule, cut: Cut, stages: Stages, stage: int, works: Sequence[Work]
) -> torch.fx.GraphModule:
    """The graph of a stage, whose work is `works`, from the graph with the ops of all stages."""
    return _Program(gm, cut, stages, stage, works).graph_module()


class _Program:
    def __init__(self, gm: torch.fx.GraphModule, cut: Cut, stages: Stages, stage: int, works: Sequence[Work]) -> None:
        self.gm, self.cut, self.stages, self.stage = gm, cut, stages, stage
        self.works = [work for work in works if cut.bodies[work.kind, self.part(work)].ops]
        self.bodies = list(dict.fromkeys((work.kind, self.part(work)) for work in self.works))
        self.mine = {self.part(work) for work in works}
        self.graph, self.root = torch.fx.Graph(), torch.nn.Module()
        self.values: dict[Node, Node] = {}
        self.messages: dict[tuple[Node, int], Node] = {}  # by value and microbatch: asked for, or there
        self.given: dict[tuple[str, int, int], Node] = {}  # results of a call, by kind, part and microbatch
        self.sums: dict[tuple[Node, int], Any] = {}  # of a sum, by part: its value so far

    def part(self, work: Work) -> int:
        """The part of the model that a piece of work is of."""
        return work.chunk * self.stages.count + self.stage

    def graph_module(self) -> torch.fx.GraphModule:
        wanted = self._wanted()
        for node in self.gm.graph.nodes:
            if node.op == "placeholder" or (node in wanted and node not in self.cut.after):
                self._copy(node)
        calls = {key: self._body(self.cut.bodies[key]) for key in self.bodies}
        self._begin_sums()
        for i, work in enumerate(self.works):
            for each in self.works[i : i + 2]:
                self._ask(each)
            self._do(work, *calls[work.kind, self.part(work)])
        for node in self.cut.after:
            if node in wanted:
                self._copy(node)
        return compat.graph_module(self.root, self.graph)

    def _here(self, node: Node) -> bool:
        return not parts_of(node) or bool(parts_of(node) & self.mine)

    def _wanted(self) -> set[Node]:
        """The ops outside of microbatches that this stage runs: what its results and bodies need, and what all stages
        do together, needed here or not."""
        todo = [n for n in self.gm.graph.nodes if n.op == "output" or over_stages(n)]
        for key in self.bodies:
            body = self.cut.bodies[key]
            todo += [*body.shared, *(n.args[0] for n in body.own)]
        wanted = set(todo)
        while todo:
            for used in ir.operands(todo.pop()):
                if used not in wanted and used not in self.cut.ops and self._here(used):
                    wanted.add(used)
                    todo.append(used)
        return wanted

    def _copy(self, node: Node) -> Node:
        args, kwargs = node.args, node.kwargs
        if node.target is aten.stack.default and any(map(parts_of, ir.operands(node))):
            args = (self._own_layers(node),)
        else:
            args, kwargs = torch.fx.node.map_arg((args, kwargs), self._value)
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        new.meta = dict(node.meta)
        self.values[node] = new
        return new

    def _own_layers(self, stack: Node) -> list[Node]:
        """What this stage has of a stack of all layers; zeros in the slots that it does not fill."""
        layers: Any = stack.args[0]
        own = [self._value(layer) for layer in layers if self._here(layer)]
        missing = self.stages.slots - len(own)
        return own + [self._zeros(own[0], own[0])] * missing if missing else own

    def _value(self, node: Node) -> Node:
        """What stands for a value outside of microbatches: on a stage that has no term of it, zero."""
        if node in self.cut.ops:
            parts = [part for part in sorted(self.mine) if (node, part) in self.sums]
            terms = [self._sum(node, part) for part in parts]
            if not terms:
                return self._zeros(node, node)
            total, *rest = terms
            for term in rest:
                total = self._emit(aten.add.Tensor, (total, term), node, compat.node_value(node))
            return total
        return self.values[node] if self._here(node) else self._zeros(node, node)

    def _zeros(self, value: Node, like: Node) -> Node:
        shape = compat.node_value(value)
        return self._emit(
            aten.full.default, (list(shape.shape), 0), like, shape, dtype=shape.dtype, device=shape.device
        )

    def _emit(self, target: Any, args: Any, like: Node, val: Any, **kwargs: Any) -> Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {"val": val, "custom": dict(compat.labels(like))}
        return new

    def _begin_sums(self) -> None:
        for key in self.bodies:
            body = self.cut.bodies[key]
            if self.cut.first:
                for node in body.sums:
                    first = self.cut.carried[node]
                    self.sums[node, body.part] = self._zeros(first, node)

    def _sum(self, node: Node, part: int) -> Node:
        """A sum so far: zeros, or one of the results of the last call that added to it."""
        so_far: Any = self.sums[node, part]
        return self._part(so_far[0], so_far[1], node) if isinstance(so_far, tuple) else so_far

    def _part(self, made: Node, index: int | slice, like: Node) -> Node:
        return self._emit(operator.getitem, (made, index), like, made.meta["val"][index])

    def _body(self, body: Body) -> tuple[Node, Node | None]:
        """The body as a submodule, and its shared operands as one."""
        name = f"{body.kind.replace(' ', '_')}_{body.part}"
        gm = _BodyWriter(self.cut, body, self._kept_before(body)).written()
        attribute = self.graph.get_attr(compat.add_body(self.root, name, gm))
        if not body.shared:
            return attribute, None
        shared = [self.values[node] for node in body.shared]
        together = self.graph.call_function(group, tuple(shared))
        together.meta = {"val": tuple(compat.node_value(x) for x in shared), "custom": _labels("step", body)}
        return attribute, together

    def _kept_before(self, body: Body) -> list[Body]:
        """The earlier bodies of the part of whose results this one reads."""
        earlier = [b for (_, part), b in self.cut.bodies.items() if part == body.part and b.kept]
        read = {used for node in body.ops for used in self.cut.operands(node, body.part)}
        return [b for b in earlier if b is not body and any(node in read for node in b.kept)]

    def _ask(self, work: Work) -> None:
        """Begin to receive what a piece of work waits for."""
        body = self.cut.bodies[work.kind, self.part(work)]
        step = -1 if work.kind == FORWARD else 1
        for node in body.received:
            if (node, work.microbatch) not in self.messages:
                val = compat.node_value(node)
                args = (list(val.shape), val.dtype, PIPE, self.stages.count, step, self._tag(node, work, body.part))
                self.messages[node, work.microbatch] = self._message(receive.op, args, node, work, val)

    def _tag(self, node: Node, work: Work, part: int) -> int:
        """A number that this value of this microbatch has on its way to `part`, and nothing else has."""
        target = next(b for b in self.cut.bodies.values() if b.part == part and node in b.received)
        at = list(target.received).index(node)
        assert at < 8, "more values cross a stage than tags are kept for"
        return ((work.microbatch * self.cut.count + part) * 2 + (target.kind != FORWARD)) * 8 + at

    def _do(self, work: Work, attribute: Node, shared: Node | None) -> None:
        """One piece of work: its messages waited for, its call, and what it sends."""
        part, number = self.part(work), work.microbatch
        body = self.cut.bodies[work.kind, part]
        step = -1 if work.kind == FORWARD else 1
        for node in body.received:
            asked = self.messages[node, number]
            args = (asked, PIPE, self.stages.count, step, self._tag(node, work, part))
            self.messages[node, number] = self._message(received.op, args, node, work, compat.node_value(node))
        operands: list[Any] = [self.messages[node, number] for node in (*body.received, *body.again)]
        operands += [self._own(node, number) for node in body.own]
        for earlier in self._kept_before(body):
            made = self.given[earlier.kind, part, number]
            begin = len(earlier.sent)
            operands.append(self._kept(earlier, made, begin))
        operands += self._sums_so_far(body)
        operands += [shared] if shared is not None else []
        made = self.graph.call_function(call, (attribute, *operands))
        vals = tuple(compat.node_value(self.cut.on(node, part)) for node in body.results)
        made.meta = {"val": vals, "custom": _labels(microbatch(number), body)}
        self.given[work.kind, part, number] = made
        for i, node in enumerate(body.sums, len(body.results) - len(body.sums)):
            self.sums[node, part] = made, i
        for i, node in enumerate(body.sent):
            self._send(self._part(made, i, node), node, work, part)

    def _kept(self, earlier: Body, made: Node, begin: int) -> Node:
        """What a body kept for later ones, as one operand: taken apart once, so that it lives no longer than needed."""
        end = begin + len(earlier.kept)
        for user in made.users:
            if user.target is operator.getitem and user.args[1] == slice(begin, end):
                return user
        new = self._part(made, slice(begin, end), made)
        made.append(new)  # at once: what else the call gives can be freed
        return new

    def _sums_so_far(self, body: Body) -> list[Any]:
        """The sums as operands: each by itself at first, then what the last call gave, as one."""
        if not (self.cut.first and body.sums):
            return []
        values = [self.sums[node, body.part] for node in body.sums]
        if not isinstance(values[0], tuple):
            return [values]
        (made, begin), (_, last) = values[0], values[-1]
        return [self._part(made, slice(begin, last + 1), made)]

    def _own(self, node: Node, number: int) -> Node:
        unbound: Any = node.args[0]
        source = self.values[unbound]
        for user in source.users:
            if user.target is operator.getitem and user.args[1] == number:
                return user
        return self._part(source, number, node)

    def _send(self, value: Node, node: Node, work: Work, part: int) -> None:
        step = 1 if work.kind == FORWARD else -1
        args = (value, PIPE, self.stages.count, step, self._tag(node, work, part + step))
        self._message(send.op, args, node, work, AbstractEval.of(compat.node_value(node)).result(send.op, args))

    def _message(self, op: Any, args: Any, node: Node, work: Work, val: Any) -> Node:
        """An op on a message, in the scope of what is sent and in its microbatch."""
        new = self._emit(op, args, node, val)
        new.meta["custom"] |= {"scope": ir.place_of(node).in_microbatch(work.microbatch)}
        return new


class _BodyWriter:
    """Writes the graph of a body."""

    def __init__(self, cut: Cut, body: Body, earlier: Sequence[Body]) -> None:
        self.cut, self.body, self.earlier = cut, body, earlier
        self.graph = torch.fx.Graph()
        self.values: dict[Node, Node] = {}

    def written(self) -> torch.fx.GraphModule:
        body, part = self.body, self.body.part
        for node in self._inputs():
            new = self.graph.placeholder(node.name)
            new.meta = {key: value for key, value in node.meta.items() if key in ("val", "sharding")}
            self.values[node] = new
        for node in body.ops:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[self.cut.on(n, part)])
            new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
            scope = ir.place_of(node).in_microbatch(None)
            region = str(compat.labels(node).get("region", "")) and scope
            phase = ir.phase_of(node) if node in self.cut.ops else _phase(body)  # a weight gathered anew
            where = {**compat.labels(node), "scope": scope, "region": region, "phase": phase}
            new.meta = {**node.meta, "custom": where}
            self.values[node] = new
        out = self.graph.output([self.values[self.cut.on(node, part)] for node in body.results])
        out.meta["paths"] = [""] * len(body.results)
        return compat.graph_module(torch.nn.Module(), self.graph)

    def _inputs(self) -> Iterator[Node]:
        """In the order of a call's operands."""
        yield from (*self.body.received, *self.body.again, *self.body.own)
        for earlier in self.earlier:
            yield from earlier.kept
        if self.cut.first:
            yield from (self.cut.carried[node] for node in self.body.sums)
        yield from self.body.shared


def _labels(scope: str, body: Body) -> dict[str, str]:
    return {"scope": scope, "phase": _phase(body), "source": ""}


def _phase(body: Body) -> str:
    return "forward" if body.kind == FORWARD else "backward"
