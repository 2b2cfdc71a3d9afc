"""Prints what the npu backend says of graphs that it cannot lower; needs standin.environment()."""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401

from llama_fn.compiler import stages
from llama_fn.compiler.backends.npu import compile
from llama_fn.errors import UserError
from llama_fn.model.transforms import named_scope


def odd(x):
    with named_scope("odd/place"):
        return torch.lgamma(x) + x.amax()


torch.npu.current_device()
for dtype in (torch.float32, torch.float64):
    try:
        stages.jit(odd).trace(torch.ones(3, dtype=dtype)).lower().compile(compile, device="npu:0")
    except UserError as error:
        print(error)
