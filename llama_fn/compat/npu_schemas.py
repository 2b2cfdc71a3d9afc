"""torch_npu's operators by their shapes alone, for a process without torch_npu that only counts what a step becomes.

The schemas are those of torch_npu 2.13.0. A process that loads torch_npu has the real ones and needs none of this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY: list[torch.library.Library] = []  # kept alive, once there is one


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    rows = q.new_empty((*q.shape[:3], 8), dtype=torch.float32)
    return torch.empty_like(q), rows, torch.empty_like(rows), q.new_empty(0), 0, 0, 0


def _attention_grad(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), q.new_empty(0), q.new_empty(0)


def _rms_norm(x: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), gamma.new_empty(gamma.shape, dtype=torch.float32)


def _halved(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_OPTIONS = (
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, {}float {}=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int sparse_mode=0"
)
_GRAD = "Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, "
_OPS: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    f"{_OPTIONS.format('', 'scale')}) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)": _attention,
    "npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str input_layout, *, "
    f"{_OPTIONS.format(_GRAD, 'scale_value')}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)": _attention_grad,
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)": _rms_norm,
    "npu_rms_norm_backward(Tensor dy, Tensor input, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)": _rms_norm_backward,
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2) -> Tensor": lambda x, *_: torch.empty_like(x),
    "npu_swiglu(Tensor input, int dim=-1) -> Tensor": _halved,
    "npu_swiglu_backward(Tensor grad_output, Tensor input, int dim=-1) -> Tensor": lambda dy, x, *_: torch.empty_like(
        x
    ),
}


def define_npu_ops() -> None:
    """Make torch.ops.npu known, unless torch_npu or an earlier call did."""
    if "torch_npu" in sys.modules or _LIBRARY:
        return
    library = torch.library.Library("npu", "FRAGMENT")
    for schema, shapes in _OPS.items():
        name = library.define(schema)
        library.impl(str(name), shapes, "Meta")
    _LIBRARY.append(library)
