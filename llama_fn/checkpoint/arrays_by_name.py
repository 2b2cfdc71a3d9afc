"""Arrays of a state as Orbax keeps them: NumPy, in nested dicts by the keys of their paths."""

from __future__ import annotations

import re
import zlib
from typing import Any

import ml_dtypes
import numpy as np
import torch


def to_numpy(t: torch.Tensor) -> np.ndarray:
    """A view where t is on the CPU: Orbax copies host arrays itself before save() returns."""
    t = t.detach().to("cpu").contiguous()
    return t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if t.dtype is torch.bfloat16 else t.numpy()


def to_torch(a: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor."""
    a = np.ascontiguousarray(a) if a.ndim else np.asarray(a)
    return (
        torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
        if a.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(a)
    )


def _keys(path: str) -> list[str]:
    return [key for key in re.split(r"[.\[\]]+", path) if key]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"params": {"wq": x}} of {"params.wq": x}."""
    by_key: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = _keys(path)
        node = by_key
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return by_key


def at_path(nested: Any, path: str) -> Any:
    """The array of a path, None where there is none."""
    for key in _keys(path):
        nested = nested.get(key) if isinstance(nested, dict) else None
    return nested


def array_checksum(a: np.ndarray) -> int:
    """CRC-32 of its elements."""
    return zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)
