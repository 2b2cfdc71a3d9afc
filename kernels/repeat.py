"""A function that a program calls many times with like arguments, so that a trace need run it only once.

What "once" means is up to who traces (llama_fn/compat/repeat.py); outside a trace such a function is called as it is.
In a graph, a call is a node that names the function's own graph, its body:

    %c0 = call(%body, [%w0, %w1, %tokens0])     results of several calls, each a tuple
    %w  = group(%w0, %w1)                       several values as one, so that they are listed once
    %c1 = call(%body, %w, %tokens1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Protocol

from kernels.scope import named_scope

_TRACER: ContextVar[Tracer | None] = ContextVar("llama_fn_repeats", default=None)


class Tracer(Protocol):
    """Who traces: makes the calls of repeated functions."""

    def call(self, fn: Callable[..., Any], args: Any, kwargs: Any, inline: bool) -> Any:
        """What fn(*args, **kwargs) returns."""
        ...

    def fold(self, fn: Callable[..., Any], total: Any, parts: Sequence[Any], args: Any, scopes: Sequence[str]) -> Any:
        """What :func:`fold` returns."""
        ...


def repeated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, of trees of tensors to a tree of tensors, pure and closing over no tensor (ValueError in a trace).

    Scopes that it opens are joined to that of each call.
    """
    return _traced_once(fn, inline=False)


def inlined(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, as for :func:`repeated`, but each call is written out when the trace ends, as jax.jit(inline=True) does.

    For what passes are to see op by op, such as a layer: it saves the time of tracing each anew, in a gradient too.
    Mark it for remat around this, not inside: the scope of a call is not known there.
    """
    return _traced_once(fn, inline=True)


def _traced_once(fn: Callable[..., Any], inline: bool) -> Callable[..., Any]:
    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = _TRACER.get()
        return fn(*args, **kwargs) if tracer is None else tracer.call(fn, args, kwargs, inline)

    return call


def fold(fn: Callable[..., Any], total: Any, parts: Sequence[Any], args: Any, scopes: Sequence[str]) -> Any:
    """The last of total = fn(total, part, *args), for part after part, each in its scope; trees of tensors throughout.

    In a trace a call hands its results to the next as one value, so that the graph grows by a node for each call,
    whatever the size of `total`. `fn` is to be as for :func:`repeated`.
    """
    tracer = _TRACER.get()
    return (folded if tracer is None else tracer.fold)(fn, total, parts, args, scopes)


def folded(fn: Callable[..., Any], total: Any, parts: Sequence[Any], args: Any, scopes: Sequence[str]) -> Any:
    """What :func:`fold` returns, every call made as it is."""
    for part, scope in zip(parts, scopes, strict=True):
        with named_scope(scope):
            total = fn(total, part, *args)
    return total


@contextmanager
def called_by(tracer: Tracer) -> Iterator[None]:
    """Calls of repeated functions inside are made by `tracer`."""
    token = _TRACER.set(tracer)
    try:
        yield
    finally:
        _TRACER.reset(token)


def call(body: Callable[..., Any], *operands: Any) -> tuple[Any, ...]:
    """The results of a body, a graph of tensors to a list of them. An operand that is several values, such as the
    results of another call, stands for each of them."""
    return tuple(body(*flat(operands)))


def group(*values: Any) -> tuple[Any, ...]:
    """Several values as one operand of calls."""
    return values


def flat(operands: Sequence[Any]) -> list[Any]:
    """Operands of a call, several in one written out."""
    each: list[Any] = []
    for operand in operands:
        each += operand if isinstance(operand, (tuple, list)) else [operand]
    return each
