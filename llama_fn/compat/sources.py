"""The line of the model that asked for an op of torch's, written on the op as our kernels do on theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from kernels import scope


class _Sources(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In the backward the engine calls, from wherever the gradient was asked for: passes/scopes.py knows better.
        if scope.current().phase == "backward":
            return func(*args, **(kwargs or {}))
        with scope.source_line():
            return func(*args, **(kwargs or {}))


def sourced(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, for a trace: its ops carry lines. Must be what is traced itself, so that ops come here before the trace."""

    @wraps(fn)
    def call(*args: Any) -> Any:
        with _Sources():
            return fn(*args)

    return call
