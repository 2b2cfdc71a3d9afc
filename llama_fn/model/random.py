"""Explicit randomness: keys are values, and the same (key, position) gives the same number on every mesh.

Numbers come from NumPy's Philox, a counter-based generator (Salmon et al. 2011), one stream per block of
`BLOCK` consecutive elements of the flattened array. A shard draws only the blocks that it touches.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
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
    """The key that everything random of a run is folded from."""
    return fold_in(Key((seed & (2**64 - 1), 0)), "seed")


def fold_in(parent: Key, data: str | int) -> Key:
    """A new key from a key and a name or number; different data give unrelated keys."""
    text = f"{parent.words[0]}:{parent.words[1]}:{type(data).__name__}:{data}".encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return Key((int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")))


def normal(
    k: Key, shape: tuple[int, ...], std: float, dtype: torch.dtype, at: tuple[slice, ...] | None = None
) -> torch.Tensor:
    """Normal numbers, mean 0: an array of `shape`, or the part of it that lies `at` a slice per dimension.

    Drawn in float32 and rounded to `dtype`, by as many threads as torch has. Besides the part only the blocks exist
    that these draw.
    """
    at = at or tuple(slice(0, size) for size in shape)
    out = np.empty([max(0, s.stop - s.start) for s in at], dtype=np.float32)
    if out.size:
        first = int(np.ravel_multi_index([s.start for s in at], shape)) if shape else 0
        last = int(np.ravel_multi_index([s.stop - 1 for s in at], shape)) if shape else 0
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # NumPy lets go of the interpreter while it draws
            list(pool.map(lambda block: _fill(out, block, k, shape, at), range(first // BLOCK, last // BLOCK + 1)))
    out *= np.float32(std)
    return torch.from_numpy(out).to(dtype)


def _fill(out: np.ndarray, block: int, k: Key, shape: tuple[int, ...], at: tuple[slice, ...]) -> None:
    """Draw one block and put what of it belongs to the part into its place."""
    first, last = block * BLOCK, min((block + 1) * BLOCK, prod(shape))
    words = np.array(fold_in(k, block).words, dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=words))
    if out.shape == shape:
        generator.standard_normal(out=out.reshape(-1)[first:last], dtype=np.float32)
        return
    drawn = generator.standard_normal(last - first, dtype=np.float32)
    index = np.unravel_index(np.arange(first, last), shape)
    inside = np.logical_and.reduce([(i >= s.start) & (i < s.stop) for i, s in zip(index, at, strict=True)])
    out[tuple(i[inside] - s.start for i, s in zip(index, at, strict=True))] = drawn[inside]
