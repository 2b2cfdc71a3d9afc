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
from collections.abc import Sequence
from typing import Any

import torch

from kernels.repeat import call, group
from kernels.scope_names import microbatch
from llama_fn import compat
from llama_fn.compiler import ir
from llama_fn.compiler.pipeline.bodies import BodyWriter, phase_of
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
        self.results: dict[tuple[str, int], tuple[Any, ...]] = {}
        self.messages: dict[tuple[Node, int], Node] = {}  # by value and microbatch: asked for, or there
        self.given: dict[tuple[str, int, int], Node] = {}  # results of a call, by kind, part and microbatch
        self.sums: dict[tuple[Node, int], Any] = {}  # of a sum, by part: its value so far

    def part(self, work: Work) -> int:
        """The part of the model that a piece of work is of."""
        return work.chunk * self.stages.count + self.stage

    def graph_module(self) -> torch.fx.GraphModule:
        outside = [n for n in self.gm.graph.nodes if n not in self.cut.ops and n not in self.cut.first]
        early, wanted = self._early(outside), self._needed([ir.output_node(self.gm.graph)])
        wanted |= self._needed([node for node in self.cut.after if over_stages(node)])
        for node in outside:
            if node.op == "placeholder" or node in early:
                self._copy(node)
        calls = {key: self._body(self.cut.bodies[key]) for key in self.bodies}
        for i, work in enumerate(self.works):
            for each in self.works[i : i + 2]:
                self._ask(each)
            self._do(work, *calls[work.kind, self.part(work)])
        for node in outside:
            if node in wanted and node not in self.values:
                self._copy(node)
        return compat.graph_module(self.root, self.graph)

    def _here(self, node: Node) -> bool:
        return not parts_of(node) or bool(parts_of(node) & self.mine)

    def _early(self, outside: Sequence[Node]) -> set[Node]:
        """What stands before the microbatches: what bodies read, and what all stages do together, needed here or not.
        What else could be computed there would only be kept."""
        ends = [node for node in outside if over_stages(node) and node not in self.cut.after]
        for key in self.bodies:
            body = self.cut.bodies[key]
            ends += [*body.shared, *(n.all_input_nodes[0] for n in body.own)]
        return self._needed(ends)

    def _needed(self, ends: Sequence[Node]) -> set[Node]:
        """Ops outside of microbatches and what they need of others there, on this stage."""
        needed, todo = set(ends), list(ends)
        while todo:
            for used in ir.operands(todo.pop()):
                if used not in needed and used not in self.cut.ops and self._here(used):
                    needed.add(used)
                    todo.append(used)
        return needed

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
        kind = {"dtype": shape.dtype, "device": shape.device}
        new = self._emit(aten.full.default, (list(shape.shape), 0), like, shape, **kind)
        new.meta["custom"]["scope"] = ir.place_of(like).in_microbatch(None)
        return new

    def _emit(self, target: Any, args: Any, like: Node, val: Any, **kwargs: Any) -> Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {"val": val, "custom": dict(compat.labels(like))}
        return new

    def _sum(self, node: Node, part: int) -> Node:
        """A sum so far: zeros, or one of the results of the last call that added to it."""
        so_far: Any = self.sums[node, part]
        return self._part(so_far[0], so_far[1], node) if isinstance(so_far, tuple) else so_far

    def _part(self, made: Node, index: int | slice, like: Node) -> Node:
        return self._emit(operator.getitem, (made, index), like, made.meta["val"][index])

    def _body(self, body: Body) -> tuple[Node, Node | None]:
        """The body as a submodule, and its shared operands as one."""
        name = f"{body.kind.replace(' ', '_')}_{body.part}"
        gm = BodyWriter(self.cut, body).written()
        attribute = self.graph.get_attr(compat.add_body(self.root, name, gm))
        if not body.shared:
            return attribute, None
        shared = [self.values[node] for node in body.shared]
        together = self.graph.call_function(group, tuple(shared))
        together.meta = {"val": tuple(compat.node_value(x) for x in shared), "custom": _labels("step", body)}
        return attribute, together

    def _ask(self, work: Work) -> None:
        """Begin to receive what a piece of work waits for."""
        body = self.cut.bodies[work.kind, self.part(work)]
        step = -1 if work.kind == FORWARD else 1
        for node in body.received:
            if (node, work.microbatch) not in self.messages:
                val = compat.node_value(node)
                args = (list(val.shape), val.dtype, PIPE, self.stages.count, step, self._tag(node, work, body.part))
                self.messages[node, work.microbatch] = self._message(
                    receive.op, args, node, work, val, device=val.device
                )

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
        for earlier in body.earlier.values():
            made = self.given[earlier.kind, part, number]
            begin = len(earlier.sent)
            operands.append(self._kept(earlier, made, begin))
        operands += self._sums_so_far(body)
        operands += [shared] if shared is not None else []
        made = self.graph.call_function(call, (attribute, *operands))
        made.meta = {"val": self._results(body), "custom": _labels(microbatch(number), body)}
        self.given[work.kind, part, number] = made
        for i, node in enumerate(body.sums, len(body.results) - len(body.sums)):
            self.sums[node, part] = made, i
        for i, node in enumerate(body.sent):
            self._send(self._part(made, i, node), node, work, part)

    def _results(self, body: Body) -> tuple[Any, ...]:
        """The fake values of what a body gives, worked out once."""
        key = body.kind, body.part
        if key not in self.results:
            self.results[key] = tuple(compat.node_value(self.cut.on(node, body.part)) for node in body.results)
        return self.results[key]

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
        for node in body.sums:
            if (node, body.part) not in self.sums:
                self.sums[node, body.part] = self._zeros(self.cut.carried[node], node)
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

    def _message(self, op: Any, args: Any, node: Node, work: Work, val: Any, **kwargs: Any) -> Node:
        """An op on a message, in the scope of what is sent and in its microbatch."""
        new = self._emit(op, args, node, val, **kwargs)
        new.meta["custom"] |= {"scope": ir.place_of(node).in_microbatch(work.microbatch), ir.MADE_BY: "pipeline"}
        return new


def _labels(scope: str, body: Body) -> dict[str, str]:
    return {"scope": scope, "phase": phase_of(body), "source": ""}
