"""A function that a gradient calls many times with like arguments, such as a layer, traced once: forward and backward.

    %y, %kept... = call(%layer, %x, %w)                       # layers/3
    %dx, %dw     = call(%layer_backward, %w, %kept..., %dy)   # backward layers/3

Both graphs are cut from one trace of a call and its vjp: what is asked for before the cotangents come is the forward,
the rest the backward, and what that reads of the forward is kept between the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack, unwrap_if_dead
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from kernels.scope import Location, at, backward_of, current
from llama_fn import tree
from llama_fn.compat.repeat_body import Body, body_name, graph_of, like, name_of, output, tracer


def is_differentiated(leaves: Sequence[Any]) -> bool:
    """Whether tensors are traced inside of one gradient, and no other transform."""
    transforms = [each.key() for each in get_interpreter_stack() or []]
    return (
        get_proxy_mode() is not None
        and transforms == [TransformType.Grad]
        and all(isinstance(x, torch.Tensor) for x in leaves)
        and any(x.requires_grad for x in leaves)
    )


class Pair:
    """The bodies of one function, called as a function that can be differentiated once."""

    def __init__(
        self, fn: Callable[..., Any], spec: tree.TreeSpec, leaves: Sequence[torch.Tensor], here: Location
    ) -> None:
        self.wanted = [i for i, x in enumerate(leaves) if x.requires_grad]

        def joint(*flat: torch.Tensor) -> list[torch.Tensor]:
            def part(*given: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
                operands = list(flat)
                for i, x in zip(self.wanted, given, strict=True):
                    operands[i] = x
                args, kwargs = tree.unflatten(spec, operands)
                out, self.out_spec = tree.flatten(fn(*args, **kwargs))
                self.floating = [i for i, x in enumerate(out) if x.is_floating_point()]
                if not self.floating:
                    raise ValueError(
                        f"{name_of(fn)} is inlined in a gradient and returns nothing that has one: call it without "
                        "transforms.inlined"
                    )
                return [out[i] for i in self.floating], out

            vjp: Any = torch.func.vjp
            floats, pull, out = vjp(part, *(flat[i] for i in self.wanted), has_aux=True)
            self.returned = len(out)
            with at(Location(phase="backward")):
                return [*out, *pull([_cotangent(x) for x in floats])]

        with temporarily_clear_interpreter_stack():
            forward, backward, self.kept = _cut(graph_of(fn, joint, leaves, here), len(leaves), len(self.wanted))
        self.floats = [output(forward).meta["vals"][i] for i in self.floating]
        self.forward = Body(body_name(fn), forward, inlined=True)
        self.backward = Body(f"{body_name(fn)}_backward", backward, inlined=True)

    def __call__(self, leaves: Sequence[torch.Tensor]) -> Any:
        """What the function returns."""
        return tree.unflatten(self.out_spec, _Differentiable.apply(_Call(self), *leaves))


def _cotangent(x: torch.Tensor) -> torch.Tensor:
    """A tensor like a result, an input of the graph from here on."""
    with disable_proxy_modes_tracing():
        made = like(x)
    track_tensor_tree(made, tracer().create_proxy("placeholder", "cotangent", (), {}), constant=None, tracer=tracer())
    return made


class _Call:
    """One call: a node in the forward and one in the backward. What is kept between them has no tensor of its own."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.location = current()
        self.kept: list[Any] = []  # proxies

    def forward(self, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        operands = [tracer().unwrap_proxy(x) for x in leaves]
        proxy = self.pair.forward(operands)
        taken = len(operands)
        self.kept = [operands[i] if i < taken else self.pair.forward.result(proxy, i - taken) for i in self.pair.kept]
        return tuple(self.pair.forward.results(proxy, self.pair.returned))

    def backward(self, cotangents: Sequence[torch.Tensor | None]) -> dict[int, torch.Tensor]:
        """Gradients, by the places of their operands."""
        pair = self.pair
        with backward_of(self.location):
            given = [_or_zeros(cotangents[i], x) for i, x in zip(pair.floating, pair.floats, strict=True)]
            operands = [*self.kept, *(tracer().unwrap_proxy(unwrap_if_dead(x)) for x in given)]
            return dict(zip(pair.wanted, pair.backward.results(pair.backward(operands)), strict=True))


class _Differentiable(torch.autograd.Function):
    """A call, for autograd."""

    @staticmethod
    def forward(call: _Call, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return call.forward(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.call = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grads = ctx.call.backward(cotangents)
        return tuple(grads.get(i - 1) for i in range(len(ctx.needs_input_grad)))


def _or_zeros(cotangent: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The cotangent of a result like x, zeros where nobody read it."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if cotangent is None else cotangent


def _cut(
    joint: torch.fx.GraphModule, taken: int, wanted: int
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, list[int]]:
    """Forward and backward of a graph whose inputs after the first `taken` are the cotangents, and whose last `wanted`
    results the gradients; and what the backward takes before the cotangents, by its place in the row of the forward's
    inputs and results."""
    nodes: list[torch.fx.Node] = list(joint.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    border = nodes.index(inputs[taken])
    results: Any = output(joint).args[0]
    returned, grads = results[:-wanted], results[-wanted:]
    read = {x for node in nodes[border:-1] for x in node.all_input_nodes} | {*grads}
    bodies = [node for node in nodes[:border] if node.op == "get_attr" and node in read]
    known = {*inputs, *returned, *bodies}
    made = [*returned, *(node for node in nodes[:border] if node in read and node not in known)]
    places = {node: i for i, node in reversed([*enumerate((*inputs[:taken], *made))]) if node in read}
    kept = dict(sorted(places.items(), key=lambda item: item[1]))
    forward = _part(joint, inputs[:taken], nodes[:border], made)
    backward = _part(joint, [*kept, *inputs[taken:]], [*bodies, *nodes[border:-1]], grads)
    return forward, backward, [*kept.values()]


def _part(
    gm: torch.fx.GraphModule, inputs: Sequence[torch.fx.Node], nodes: Sequence[torch.fx.Node], results: Any
) -> torch.fx.GraphModule:
    """The graph of some of another's nodes."""
    graph, root = torch.fx.Graph(), torch.nn.Module()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = copy.copy(node.meta)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr":
            root.add_module(str(node.target), getattr(gm, str(node.target)))
    out = graph.output([copies[x] for x in results])
    out.meta["vals"] = [x.meta["val"] for x in results]
    return _LazyGraphModule(root, graph)
