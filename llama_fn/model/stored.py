"""How the matrices of a model lie in memory while it generates text: as a product of few rows reads them fastest.

A product of one token with a [D, F] matrix is bound by reading it once. On CPUs (oneDNN and MKL of torch 2.13, two
cores with AMX; benchmarks/decode.py) bfloat16 is read ten times faster where the dimension that is summed over lies
innermost, and float32 up to twice as fast where it lies outermost. Training keeps the order of the declarations, in
which products of many rows are fast both ways. The numbers are those of the same products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llama_fn import tree
from llama_fn.config import ModelConfig
from llama_fn.model import llama, weights
from llama_fn.model.arrays import ArrayInfo

# Of a leaf without its layers: which of its declared dimensions comes first in memory, second, ...
_NARROW = {
    "wq": (1, 2, 0), "wk": (1, 2, 0), "wv": (1, 2, 0), "wo": (2, 0, 1),
    "w_gate": (1, 0), "w_up": (1, 0), "w_down": (1, 0),
}  # fmt: skip
_WIDE = {"lm_head": (1, 0)}


def _order(path: str, rank: int, cfg: ModelConfig) -> tuple[int, ...]:
    """That of a leaf of `rank` dimensions, its layers among them or not."""
    orders = _NARROW if cfg.compute_dtype in ("bf16", "fp16") else _WIDE
    own = orders.get(path.rpartition(".")[2])
    if own is None:
        return tuple(range(rank))
    first = rank - len(own)
    return (*range(first), *(first + dim for dim in own))


def infos(cfg: ModelConfig) -> llama.Params:
    """The declarations of parameters that lie so."""

    def turned(path: str, info: ArrayInfo) -> ArrayInfo:
        order = _order(path, len(info.shape), cfg)
        return replace(info, shape=tuple(info.shape[i] for i in order), axes=tuple(info.axes[i] for i in order))

    found: llama.Params = tree.map_with_path(turned, llama.abstract_params(cfg))
    return found


def turned(params: llama.Params, cfg: ModelConfig) -> llama.Params:
    """Parameters as they are declared, or a device's part of them, brought into that order."""

    def turn(path: str, x: torch.Tensor) -> torch.Tensor:
        return x.permute(_order(path, x.dim(), cfg)).contiguous()

    found: llama.Params = tree.map_with_path(turn, params)
    return found


def gathered(params: llama.Params, cfg: ModelConfig) -> llama.Params:
    """weights.gather of parameters that lie so, with the dimensions as declared: views."""

    def straight(path: str, x: torch.Tensor) -> torch.Tensor:
        order = _order(path, x.dim(), cfg)
        if order == tuple(range(x.dim())):
            return x
        back: Any = sorted(range(x.dim()), key=order.__getitem__)
        return x.permute(back)

    found: llama.Params = tree.map_with_path(straight, weights.gather(params, infos(cfg)))
    return found
