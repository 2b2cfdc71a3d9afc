"""Tracing once what a step repeats: calls of repeated functions (kernels/repeat.py) become nodes that name a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from kernels.repeat import folded, group
from kernels.scope import Location, current, named_scope
from llama_fn import tree
from llama_fn.compat.repeat_body import Body, body_name, graph_of, name_of, output, tracer
from llama_fn.compat.repeat_vjp import Pair, is_differentiated

_Made = TypeVar("_Made")


class Repeats:
    """What one trace knows of the repeated functions that are called in it."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def call(self, fn: Callable[..., Any], args: Any, kwargs: Any, inline: bool) -> Any:
        """Traced the first time, a node each time; run as it is in a real computation, and, where it is not inlined,
        inside a gradient or a remat region."""
        leaves, spec = tree.flatten((args, kwargs))
        if _is_traced(leaves) and (inline or not current().region):
            return self._once(_Function, fn, spec, leaves, inline).results([_proxy(x) for x in leaves])
        if inline and is_differentiated(leaves):
            return self._once(Pair, fn, spec, leaves)(leaves)
        return fn(*args, **kwargs)

    def fold(self, fn: Callable[..., Any], total: Any, parts: Sequence[Any], args: Any, scopes: Sequence[str]) -> Any:
        """A node for each part; only the results of the last are taken apart."""
        leaves, spec = tree.flatten(((total, parts[0], *args), {}))
        if not _is_traced(leaves) or current().region:
            return folded(fn, total, parts, args, scopes)
        function = self._once(_Function, fn, spec, leaves, False)
        taken, structure = tree.flatten(total)
        returned = output(function.body.gm).meta["vals"]
        if function.out_spec != structure or any(_kind(x) != _kind(y) for x, y in zip(taken, returned, strict=True)):
            raise ValueError(
                f"{name_of(fn)} is folded over parts and takes a total of {[*map(_kind, taken)]}, but returns "
                f"{[*map(_kind, returned)]}. Return the structure, shapes and dtypes that it takes"
            )
        state: Any = [_proxy(x) for x in taken]
        shared = tracer().create_proxy("call_function", group, tuple(_proxy(x) for x in tree.flatten(args)[0]), {})
        for part, scope in zip(parts[:-1], scopes[:-1], strict=True):
            with named_scope(scope):
                state = function.body([state, *(_proxy(x) for x in tree.flatten(part)[0]), shared])
        with named_scope(scopes[-1]):
            return function.results([state, *(_proxy(x) for x in tree.flatten(parts[-1])[0]), shared])

    def _once(
        self, make: Callable[..., _Made], fn: Callable[..., Any], spec: tree.TreeSpec, leaves: Sequence[torch.Tensor],
        *options: bool,
    ) -> _Made:  # fmt: skip
        here = current()
        kinds = tuple((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in leaves)
        key = (make, fn, spec, options, here.phase, here.source, kinds)
        if key not in self.known:
            self.known[key] = make(fn, spec, leaves, here, *options)
        made: _Made = self.known[key]
        return made


class _Function:
    """The body of one function of trees."""

    def __init__(
        self, fn: Callable[..., Any], spec: tree.TreeSpec, leaves: Sequence[torch.Tensor], here: Location, inline: bool
    ) -> None:
        def flat_fn(*flat: torch.Tensor) -> list[torch.Tensor]:
            args, kwargs = tree.unflatten(spec, flat)
            out, self.out_spec = tree.flatten(fn(*args, **kwargs))
            return out

        self.body = Body(body_name(fn), graph_of(fn, flat_fn, leaves, here), inline)

    def results(self, operands: Sequence[Any]) -> Any:
        """What a call of these proxies returns, as a tree of tensors that are traced on."""
        return tree.unflatten(self.out_spec, self.body.results(self.body(operands)))


def _is_traced(leaves: Sequence[Any]) -> bool:
    return get_proxy_mode() is not None and all(map(_plain, leaves))


def _plain(x: Any) -> bool:
    """A tensor that nothing differentiates."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return isinstance(x, torch.Tensor) and not inside and not x.requires_grad


def _proxy(x: torch.Tensor) -> Any:
    return tracer().unwrap_proxy(x)


def _kind(x: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(x.shape), x.dtype
