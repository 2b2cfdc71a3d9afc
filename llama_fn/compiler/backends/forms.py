"""Faster forms of kernels that a backend may use, by kernel and form name.

Kernels bring the forms that are plain torch (`Kernel.impls`); the ones here call fused operators of torch whose names
are private and live in llama_fn/compat/. Which form is used is chosen by name and said once at compile time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.head_loss import head_loss
from kernels.registry import KERNELS
from llama_fn import compat
from llama_fn.errors import UserError, nearest

log = logging.getLogger("llama_fn.inductor")


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, K, H] -> [B, N, S, H], kv heads repeated for the query heads that read them."""
    return x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1) if heads != x.shape[2] else x.transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """torch's FlashAttention-2 kernels (Dao 2023). They know no documents: `choose` sees to it."""
    n = q.shape[2]
    o, lse = compat.flash_attention(q.transpose(1, 2), _heads(k, n), _heads(v, n), scale)
    return o.transpose(1, 2).contiguous(), lse.contiguous()


def flash_bwd(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The gradient of `flash`, from its o and lse."""
    n, kv = q.shape[2], k.shape[2]
    operands = (do.transpose(1, 2), q.transpose(1, 2), _heads(k, n), _heads(v, n), o.transpose(1, 2), lse)
    dq, dk, dv = compat.flash_attention_backward(*operands, scale)
    if n != kv:
        dk, dv = (x.unflatten(1, (kv, n // kv)).sum(2) for x in (dk, dv))
    return tuple(x.transpose(1, 2).contiguous() for x in (dq, dk, dv))


FORMS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "head_loss": head_loss.impls,
    "attention": {"flash": flash, **KERNELS["attention"].impls},
    "attention_bwd": {"flash": flash_bwd, **KERNELS["attention_bwd"].impls},
}


def find(kernel: str, form: str) -> Callable[..., Any]:
    """The form of a kernel; `reference` always exists. UserError for an unknown one."""
    if form == "reference":
        return KERNELS[kernel].reference
    if form == "npu":
        return KERNELS[kernel].npu or KERNELS[kernel].reference
    known = FORMS.get(kernel, {})
    if form not in known:
        raise UserError(f"kernel {kernel} has no form {form!r}. {nearest(form, ['reference', *known])}")
    return known[form]


def finder(collectives: Mapping[str, Callable[..., Any]]) -> Callable[[str, str], Callable[..., Any]]:
    """`find` that also knows how this process runs the collectives."""
    return lambda kernel, form: collectives[kernel] if kernel in collectives else find(kernel, form)


def choose(device: str, dtype: torch.dtype, attention: str, segments: bool = False) -> dict[str, str]:
    """The form per kernel family: `attention` as asked for or, with auto, the fastest known on the device. `segments`:
    whether rows hold documents that do not see one another.

    UserError where the device has no such form for the dtype.
    """
    takes_flash = device == "cpu" or dtype in (torch.float16, torch.bfloat16)
    if attention == "flash" and not takes_flash:
        raise UserError(
            f"--run.attention=flash: torch's FlashAttention on {device} takes bf16 and fp16, and the step computes in "
            f"{str(dtype).removeprefix('torch.')}. Use --run.attention=blocked or --model.compute_dtype=bf16"
        )
    if attention == "flash" and segments:
        raise UserError("--run.attention=flash knows no documents (--data.segments): use --run.attention=blocked")
    if attention == "auto":
        attention = "flash" if device == "cuda" and takes_flash and not segments else "blocked"
        if device == "cuda" and segments:
            log.warning(
                "attention within documents (--data.segments) is computed block by block, not by FlashAttention"
            )
    return {"attention": attention} | ({"head_loss": "in_place"} if device == "cpu" else {})
