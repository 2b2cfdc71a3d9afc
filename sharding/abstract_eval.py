"""What ops make of tensors without storage (shape, dtype, strides), worked out once for each kind of operands:
layers repeat, microbatches too, and so do the meshes that one trace is lowered for."""

from __future__ import annotations

from typing import Any

import torch

_MEMO = "llama_fn_values"


class AbstractEval:
    """Results of ops in one world of such tensors, a FakeTensorMode of torch."""

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.known: dict[str, Any] = {}
        self.kinds: dict[int, str] = {}  # by identity of a value, which `kept` holds on to
        self.kept: list[Any] = []

    @classmethod
    def of(cls, value: Any) -> AbstractEval:
        """Those of the world that `value`, a tensor or several, is from."""
        first = value[0] if isinstance(value, (tuple, list)) else value
        memo: dict[str, Any] = vars(first.fake_mode)  # lives and dies with its world
        if _MEMO not in memo:
            memo[_MEMO] = cls(first.fake_mode)
        known: AbstractEval = memo[_MEMO]
        return known

    def result(self, target: Any, args: Any, kwargs: Any = {}) -> Any:  # noqa: B006 (never written)
        """What target(*args, **kwargs) gives, nodes standing for their values; the same object for the same kind."""
        key = f"{target}{torch.fx.node.map_arg((args, kwargs), self._kind)}"
        if key not in self.known:
            values, named = torch.fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
            with self.mode:
                self.known[key] = target(*values, **named)
        return self.known[key]

    def _kind(self, node: torch.fx.Node) -> str:
        value = node.meta["val"]
        kind = self.kinds.get(id(value))
        if kind is None:
            several = value if isinstance(value, (tuple, list)) else [value]
            kind = " ".join(f"{x.dtype}{tuple(x.shape)}{x.stride()}{x.device}" for x in several)
            self.kinds[id(value)] = kind
            self.kept.append(value)
        return kind
