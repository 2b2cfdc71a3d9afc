"""Which op of a graph first gives a value that is not finite (--run.check_finite, backends eager and interpret)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from llama_fn import compat
from llama_fn.compiler import calls, ir
from llama_fn.model.arrays import describe


class NonFinite(ArithmeticError):
    """The message names the op, its scope, phase and line, or the input, and what its operands were."""


def check_inputs(graph: torch.fx.Graph, inputs: Iterable[Any], device: str = "") -> None:
    """NonFinite naming the first input whose values are not all finite; `device` says of which one."""
    for node, value in zip(ir.placeholders(graph), inputs, strict=True):
        if bad := _bad(value):
            raise NonFinite(f"the step was given {node.meta.get('path', node.name)}{device} with {bad}")


def check_result(node: torch.fx.Node, result: Any, operands: Iterable[Any], device: str = "", within: str = "") -> None:
    """NonFinite where an op, whose operands were finite, gave something that is not; `within`: the scope in which its
    graph is called."""
    if bad := _bad(result):
        labels = compat.labels(node)
        scope = calls.joined(within, ir.scope_of(node))
        where = ", ".join(filter(None, (scope, ir.phase_of(node), str(labels.get("source", "")))))
        given = "; ".join(_range(t) for t in _tensors(operands))
        raise NonFinite(f"{ir.target_text(node)} in {where}{device} gave {bad}. Its operands are finite: {given}")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for x in value for t in _tensors(x)] if isinstance(value, (tuple, list)) else []


def _bad(value: Any) -> str:
    """ "3 nan and 1 inf among 64 values of f32[8,8]" of the first tensor that has any, else ""."""
    for t in _tensors(value):
        if t.is_floating_point() and not torch.isfinite(t).all():
            counts = ((int(torch.isnan(t).sum()), "nan"), (int(torch.isinf(t).sum()), "inf"))
            return f"{' and '.join(f'{n} {what}' for n, what in counts if n)} among {t.numel()} values of {describe(t)}"
    return ""


def _range(t: torch.Tensor) -> str:
    if not t.numel() or not t.is_floating_point():
        return describe(t)
    return f"{describe(t)} from {t.min().item():.3g} to {t.max().item():.3g}"
