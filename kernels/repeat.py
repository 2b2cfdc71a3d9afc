"""A function that a program calls many times with like arguments, so that a trace need run it only once.

What "once" means is up to who traces (llama_fn/compat/repeat.py); outside a trace such a function is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

Call = Callable[..., Any]  # (fn, args, kwargs) -> what fn(*args, **kwargs) returns
_CALL: ContextVar[Call | None] = ContextVar("llama_fn_repeated_call", default=None)


def repeated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, of trees of tensors to a tree of tensors, pure and closing over no tensor (ValueError in a trace).

    Scopes that it opens are joined to that of each call.
    """

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracing = _CALL.get()
        return fn(*args, **kwargs) if tracing is None else tracing(fn, args, kwargs)

    return call


@contextmanager
def called_by(call: Call) -> Iterator[None]:
    """Calls of repeated functions inside are made by `call`."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)
