"""Megatron's indexed dataset: PREFIX.bin holds the tokens, PREFIX.idx where each sequence lies.

.idx, little-endian: "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 N sequences, u64 M = documents + 1,
i32[N] lengths, i64[N] byte offsets, i64[M] sequence number at which each document begins (the last is N).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llama_fn.errors import UserError
from llama_fn.files import atomic

MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")


def files(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def best_dtype(vocab_size: int) -> type:
    """uint16 below 65500 tokens, as Megatron chooses."""
    return np.uint16 if vocab_size < 65500 else np.int32


def write(prefix: Path, sequences: Iterable[np.ndarray], dtype: type) -> tuple[int, int]:
    """Write one document per sequence; returns (documents, tokens). The .idx appears last, when all is on disk."""
    bin_path, idx_path = files(prefix)
    lengths: list[int] = []
    with atomic(bin_path, "wb") as f:
        for sequence in sequences:
            f.write(np.ascontiguousarray(sequence, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
            lengths.append(len(sequence))
    code = next(code for code, known in DTYPES.items() if known is dtype)
    sizes = np.array(lengths, dtype="<i4")
    ends = np.cumsum(sizes, dtype=np.int64)
    offsets = (np.concatenate([[0], ends[:-1]]) if len(ends) else ends) * np.dtype(dtype).itemsize
    with atomic(idx_path, "wb") as f:
        f.write(_HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1))
        f.write(sizes.tobytes() + offsets.astype("<i8").tobytes())
        f.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    return len(sizes), int(sizes.sum(dtype=np.int64))


class IndexedDataset:
    """Read-only view of PREFIX.bin/.idx; `lengths` [N] int32, one sequence per item."""

    def __init__(self, prefix: Path) -> None:
        self.bin_path, idx_path = files(prefix)
        for path in (self.bin_path, idx_path):
            if not path.is_file():
                raise UserError(f"{path} is missing; a dataset needs both {prefix.name}.bin and {prefix.name}.idx")
        raw = np.memmap(idx_path, mode="r", dtype=np.uint8) if idx_path.stat().st_size else np.empty(0, np.uint8)
        code, n, m = _check_header(idx_path, raw[: _HEADER.size].tobytes(), len(raw))
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        at = _HEADER.size
        self.lengths = raw[at : at + 4 * n].view("<i4")
        self.offsets = raw[at + 4 * n : at + 12 * n].view("<i8")
        self.documents = raw[at + 12 * n : at + 12 * n + 8 * m].view("<i8")
        if n == 0:
            raise UserError(f"{idx_path} lists no sequences: the dataset is empty")
        needed = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if self.bin_path.stat().st_size < needed:
            raise UserError(
                f"{self.bin_path} is truncated: {idx_path.name} needs {needed} bytes, it has "
                f"{self.bin_path.stat().st_size}; copy it again"
            )
        self.tokens = np.memmap(self.bin_path, mode="r", dtype=self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, sequence: int, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of one sequence."""
        base = int(self.offsets[sequence]) // self.dtype.itemsize
        return self.tokens[base + start : base + stop]


def _check_header(path: Path, header: bytes, size: int) -> tuple[int, int, int]:
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is truncated: {size} bytes, a header alone has {_HEADER.size}; copy it again")
    magic, version, code, n, m = _HEADER.unpack(header)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise UserError(f"{path} is not a Megatron index (magic {magic!r}, version {version}, dtype code {code})")
    needed = _HEADER.size + 12 * n + 8 * m
    if size < needed:
        raise UserError(f"{path} is truncated: {n} sequences need {needed} bytes, it has {size}; copy it again")
    return code, n, m


def exists(prefix: Path) -> bool:
    return all(os.path.isfile(path) for path in files(prefix))
