"""Arrays of a state as Orbax keeps them: NumPy, in nested dicts by the keys of their paths."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import torch


def to_numpy(t: torch.Tensor) -> np.ndarray:
    """A view of a tensor of the CPU."""
    t = t.detach().contiguous()
    return t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if t.dtype is torch.bfloat16 else t.numpy()


def to_torch(a: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor."""
    a = np.ascontiguousarray(a) if a.ndim else np.asarray(a)
    return (
        torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
        if a.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(a)
    )


def keys(path: str) -> list[str]:
    """["params", "wq"] of "params.wq"."""
    return [key for key in re.split(r"[.\[\]]+", path) if key]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"params": {"wq": x}} of {"params.wq": x}."""
    by_key: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = keys(path)
        node = by_key
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return by_key
