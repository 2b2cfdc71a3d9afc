"""Megatron's indexed dataset: PREFIX.bin holds the tokens, PREFIX.idx where each sequence lies.

.idx, little-endian: "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 N sequences, u64 M = documents + 1,
i32[N] lengths, i64[N] byte offsets, i64[M] sequence number at which each document begins (the last is N).
"""

from __future__ import annotations

import os
import struct
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llama_fn.data.integrity import Extremes, check_index, read_sums, refuse_other_tokens, verified
from llama_fn.errors import UserError

MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
HEADER = struct.Struct("<9sQBQQ")


def files(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def exists(prefix: Path) -> bool:
    """Whether both files of a prefix are there."""
    return all(os.path.isfile(path) for path in files(prefix))


def best_dtype(vocab_size: int) -> type:
    """uint16 below 65500 tokens, as Megatron chooses."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedDataset:
    """Read-only view of PREFIX.bin/.idx; `lengths` [N] int32, one sequence per item. UserError naming the field that is
    wrong, where one is; token values are another matter (`verify`)."""

    def __init__(self, prefix: Path) -> None:
        self.prefix, (self.bin_path, self.idx_path) = prefix, files(prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise UserError(f"{path} is missing; a dataset needs both {prefix.name}.bin and {prefix.name}.idx")
        try:
            raw = _mapped(self.idx_path, np.dtype(np.uint8))
            code, n, m = _check_header(self.idx_path, raw[: HEADER.size].tobytes(), len(raw))
            self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
            at = HEADER.size
            self.lengths = raw[at : at + 4 * n].view("<i4")
            self.offsets = raw[at + 4 * n : at + 12 * n].view("<i8")
            self.documents = raw[at + 12 * n : at + 12 * n + 8 * m].view("<i8")
            check_index(self.idx_path, self.bin_path, self.lengths, self.offsets, self.documents, self.dtype.itemsize)
            self.tokens = _mapped(self.bin_path, self.dtype)
        except OSError as error:
            raise UserError(f"{error.filename or prefix} cannot be read: {error.strerror or error}") from None

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, sequence: int, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of one sequence."""
        base = int(self.offsets[sequence]) // self.dtype.itemsize
        return self.tokens[base + start : base + stop]

    def verify(self, vocab_size: int, memory: Path) -> None:
        """UserError for a checksum that is not met, and for a token that is not below `vocab_size`; all of the data is
        read, once: `memory` is the file that remembers it."""
        extremes = verified(self.prefix, files(self.prefix), self.tokens, memory)
        self._refuse(extremes, vocab_size)

    def _refuse(self, extremes: Extremes, vocab_size: int) -> None:
        refuse_other_tokens(self.bin_path, self.tokens, self.offsets, extremes, vocab_size)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data: its index and, where sums were written, every token."""
        crc = 0
        raw = _mapped(self.idx_path, np.dtype(np.uint8))
        for first in range(0, len(raw), 1 << 24):
            crc = zlib.crc32(raw[first : first + (1 << 24)].data, crc)
        listed = read_sums(self.prefix).get(self.bin_path.name)
        return {
            "sequences": len(self), "tokens": len(self.tokens), "index_crc32": crc,
            "tokens_crc32": None if listed is None else zlib.crc32(repr(listed).encode()),
        }  # fmt: skip


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    return np.memmap(path, mode="r", dtype=dtype) if path.stat().st_size else np.empty(0, dtype)


def _check_header(path: Path, header: bytes, size: int) -> tuple[int, int, int]:
    if len(header) < HEADER.size:
        raise UserError(f"{path} is truncated: {size} bytes, a header alone has {HEADER.size}; copy it again")
    magic, version, code, n, m = HEADER.unpack(header)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise UserError(f"{path} is not a Megatron index (magic {magic!r}, version {version}, dtype code {code})")
    if np.dtype(DTYPES[code]).kind == "f":
        raise UserError(f"{path}: dtype code {code} is {np.dtype(DTYPES[code])}, and tokens are whole numbers")
    needed = HEADER.size + 12 * n + 8 * m
    if size < needed:
        raise UserError(f"{path} is truncated: {n} sequences need {needed} bytes, it has {size}; copy it again")
    if size > needed:
        raise UserError(
            f"{path} has {size - needed} bytes beyond the {needed} of {n} sequences and {m - 1} documents: it is "
            "damaged, or an index of several modes, which is not supported"
        )
    if n == 0 or m == 0:
        raise UserError(f"{path} lists no sequences: the dataset is empty")
    return code, n, m
