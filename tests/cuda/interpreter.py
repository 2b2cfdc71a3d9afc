"""Runs CUDA code on a CPU: inductor's kernels by Triton's interpreter, torch's operators by those of the CPU.

What a GPU does of itself is not run: its schedule, its atomics, its memory, a CUDA graph. bfloat16 is not for here:
Triton's interpreter cuts it off where a GPU rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import h100
import numpy as np
import torch

MATHS: dict[str, Callable[..., Any]] = {
    "exp": np.exp, "log": np.log, "pow": np.power, "rsqrt": lambda x: 1 / np.sqrt(x), "isnan": np.isnan,
    "isinf": np.isinf,
}  # fmt: skip
_ATEN = torch.library.Library("aten", "IMPL")


def pretend() -> None:
    """Run what is compiled for CUDA, from now on, in this process, on CPU tensors."""
    h100.pretend([])
    from torch._inductor import compile_fx
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    triton_helpers.libdevice = SimpleNamespace(**{name: _elementwise(name, fn) for name, fn in MATHS.items()})
    triton_heuristics.CachingAutotuner.precompile = lambda *_, **__: None
    triton_heuristics.CachingAutotuner.run = _run
    compile_fx.cudagraphify = lambda model, *_, **__: model
    torch._C._dynamo.guards._empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cpu
    torch.cuda.set_device = lambda _: None
    _ATEN.impl("_scaled_dot_product_flash_attention", _flash, "CPU")
    _ATEN.impl("_scaled_dot_product_flash_attention_backward", _flash_backward, "CPU")


def _run(kernel: Any, *args: Any, stream: int) -> None:
    """A kernel in the first of the configurations that autotuning would choose from."""
    from torch._inductor.runtime.triton_heuristics import GridExpr, config_to_dict

    config = kernel.configs[0]
    names = [name for name in kernel.fn.arg_names if name not in config.kwargs]
    given = dict(zip(names, args, strict=True))
    sizes = {name: value for name, value in given.items() if name.endswith("numel")}
    grid = GridExpr.from_meta(kernel.inductor_meta, config).eval_slow({**sizes, **config_to_dict(config)})
    kernel.fn[grid](**given, **{k: v for k, v in config.kwargs.items() if k in kernel.fn.arg_names})


def _elementwise(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of CUDA's libdevice, which the interpreter lacks."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*args: Any) -> Any:
        first = next(x for x in args if isinstance(x, tl.core.tensor))
        kind, element = (np.int32, tl.int32) if name.startswith("is") else (first.handle.data.dtype, first.dtype)
        data = [x.handle.data if isinstance(x, tl.core.tensor) else np.asarray(x, kind) for x in args]
        with np.errstate(all="ignore"):
            out = np.asarray(fn(*data)).astype(kind)
        shape = first.type.with_element_ty(element) if first.type.is_block() else element
        return tl.core.tensor(TensorHandle(out, element), shape)

    return call


def _flash(q, k, v, dropout=0.0, causal=False, mask=False, *, scale=None):
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale)
    none, seed = torch.empty(0), torch.zeros(2, dtype=torch.uint64)
    return o, lse.contiguous(), none, none, q.shape[2], k.shape[2], seed, seed[0], none


def _flash_backward(do, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale=None):
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = backward(do, q, k, v, o, lse, dropout, causal, scale=scale)
    return tuple(torch.empty_like(x).copy_(g) for x, g in zip((q, k, v), grads, strict=True))  # laid out as CUDA's
