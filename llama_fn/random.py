"""Explicit randomness: keys are values, and the same (key, position) gives the same number on every mesh.

Numbers come from NumPy's Philox, a counter-based generator (Salmon et al. 2011), one stream per block of
`BLOCK` consecutive elements of the flattened array. A shard draws only the blocks that it touches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

BLOCK = 1 << 18


@dataclass(frozen=True)
class Key:
    """A 128-bit key."""

    words: tuple[int, int]


def key(seed: int) -> Key:
    return fold_in(Key((seed & (2**64 - 1), 0)), "seed")


def fold_in(parent: Key, data: str | int) -> Key:
    """A new key from a key and a name or number; different data give unrelated keys."""
    text = f"{parent.words[0]}:{parent.words[1]}:{type(data).__name__}:{data}".encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return Key((int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")))


def normal(
    k: Key, shape: tuple[int, ...], std: float, dtype: torch.dtype, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Normal numbers, mean 0; the flat elements start..stop of an array of `shape` (all of them, shaped, without).

    Drawn in float32 and rounded to `dtype`.
    """
    size = prod(shape)
    whole = stop is None
    stop = size if stop is None else stop
    out = np.empty(stop - start, dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = block * BLOCK, min((block + 1) * BLOCK, size)
        words = fold_in(k, block).words
        drawn = np.random.Generator(np.random.Philox(key=np.array(words, dtype=np.uint64))).standard_normal(
            last - first, dtype=np.float32
        )
        lo, hi = max(first, start), min(last, stop)
        out[lo - start : hi - start] = drawn[lo - first : hi - first]
    out *= np.float32(std)
    values = torch.from_numpy(out).to(dtype)
    return values.reshape(shape) if whole else values
