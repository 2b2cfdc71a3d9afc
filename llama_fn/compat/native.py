"""Fused operators of torch that have no public name, and what the CPU and its allocator are asked for."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch
from torch import Tensor


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention on [B, N, T, H]: o and log-sum-exp [B, N, T]."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[:2]


def flash_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """dq, dk, dv of :func:`flash_attention`."""
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(do, q, k, v, o, lse, 0.0, True, scale=scale)
    t = q.shape[2]
    seed = torch.zeros((2,), dtype=torch.uint64, device=q.device)
    op = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return op(do, q, k, v, o, lse, None, None, t, t, 0.0, True, seed, seed[0], scale=scale)


def slow_products() -> frozenset[torch.dtype]:
    """The 16-bit dtypes whose products this CPU has no instructions for."""
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, there in fast.items() if not there)


def cpu_model() -> str:
    """Everything about this CPU that compiled code depends on: it is built for exactly this one (-march=native)."""
    facts = {torch.backends.cpu.get_cpu_capability()}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith(("model name", "flags", "Features", "CPU part")):
            facts.add(line)
    return "\n".join(sorted(facts))


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> bool:
    """Tell glibc's malloc to keep freed memory, so that large tensors are not mapped and zeroed again every step.

    Returns False where there is no glibc; then nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    limit = 2**31 - 1
    return bool(mallopt(M_MMAP_THRESHOLD, limit) and mallopt(M_TRIM_THRESHOLD, limit))


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return max(1, len(siblings))
