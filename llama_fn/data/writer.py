"""Writing PREFIX.bin/.idx, with sums beside it, so that a process that was killed goes on where it was.

Tokens go to a file aside, lengths to another, and every few seconds a journal says how much of both is on disk. The
names carry the machine's, as several that share a folder may make the same data.
"""

from __future__ import annotations

import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llama_fn.data.indexed import DTYPES, HEADER, MAGIC, files
from llama_fn.data.integrity import BlockSums, write_sums
from llama_fn.files import atomic, sync

JOURNAL_S = 5.0


def write(prefix: Path, sequences: Iterable[np.ndarray], dtype: type) -> tuple[int, int]:
    """Write one document per sequence, from the first; returns (documents, tokens)."""
    drop(prefix)
    return write_on(prefix, lambda done: islice(sequences, done, None), dtype)


def drop(prefix: Path) -> None:
    """What was begun and not finished."""
    _Aside(prefix).remove()


def write_on(
    prefix: Path,
    sequences: Callable[[int], Iterable[np.ndarray]],
    dtype: type,
    said: Callable[[int], None] = lambda done: None,
) -> tuple[int, int]:
    """Write one document for each of `sequences(done)`, where an earlier call for the same sequences wrote the first
    `done`; returns (documents, tokens) of all. The .idx appears last, when everything is on disk."""
    aside = _Aside(prefix)
    aside.parent.mkdir(parents=True, exist_ok=True)
    done = aside.resume()
    if done:
        said(done)
    kind = np.dtype(dtype).newbyteorder("<")
    with open(aside.tokens, "ab") as tokens, open(aside.lengths, "ab") as lengths:
        written = time.monotonic()
        try:
            for sequence in sequences(done):
                data = np.ascontiguousarray(sequence, dtype=kind).tobytes()
                tokens.write(data)
                lengths.write(aside.counted(len(sequence)))
                aside.sums.add(data)
                done += 1
                if time.monotonic() - written > JOURNAL_S:
                    aside.journal(done, tokens, lengths)
                    written = time.monotonic()
        except KeyboardInterrupt:  # asked to stop, between two sequences
            aside.journal(done, tokens, lengths)
            raise
        for file in (tokens, lengths):
            file.flush()
            os.fsync(file.fileno())
    return _finish(prefix, aside, dtype)


def _finish(prefix: Path, aside: _Aside, dtype: type) -> tuple[int, int]:
    bin_path, idx_path = files(prefix)
    sizes = np.fromfile(aside.lengths, dtype="<i4")
    ends = np.cumsum(sizes, dtype=np.int64)
    offsets = (np.concatenate([[0], ends[:-1]]) if len(ends) else ends) * np.dtype(dtype).itemsize
    code = next(code for code, known in DTYPES.items() if known is dtype)
    index = [
        HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1), sizes.tobytes(), offsets.astype("<i8").tobytes(),
        np.arange(len(sizes) + 1, dtype="<i8").tobytes(),
    ]  # fmt: skip
    idx_sums = BlockSums()
    for part in index:
        idx_sums.add(part)
    idx_path.unlink(missing_ok=True)  # an index stands beside the tokens that it was made for, or not at all
    os.replace(aside.tokens, bin_path)
    sync(prefix.parent)
    write_sums(prefix, {bin_path.name: aside.sums, idx_path.name: idx_sums})
    with atomic(idx_path, "wb") as f:
        f.writelines(index)
    aside.remove()
    return len(sizes), int(ends[-1]) if len(ends) else 0


class _Aside:
    """The files of a dataset that is not complete, and how far they are known to be good."""

    def __init__(self, prefix: Path) -> None:
        self.parent, name = prefix.parent, f".{prefix.name}.{socket.gethostname()}"
        self.tokens, self.lengths = self.parent / f"{name}.bin.partial", self.parent / f"{name}.lengths.partial"
        self.state, self.sums, self.lengths_crc = self.parent / f"{name}.json.partial", BlockSums(), 0

    def counted(self, length: int) -> bytes:
        """A length as it is written."""
        data = np.array(length, "<i4").tobytes()
        self.lengths_crc = zlib.crc32(data, self.lengths_crc)
        return data

    def resume(self) -> int:
        """How many sequences are kept; what follows them, or is not as the journal says, is dropped."""
        done = self._kept()
        if not done:
            self.sums, self.lengths_crc = BlockSums(), 0
            self.remove()
        return done

    def _kept(self) -> int:
        try:
            state = json.loads(self.state.read_bytes())
            done, size, crc = int(state["sequences"]), int(state["bytes"]), int(state["lengths_crc32"])
            lengths = self.lengths.read_bytes()[: 4 * done]
            self.lengths_crc = zlib.crc32(lengths)
            if len(lengths) != 4 * done or self.lengths_crc != crc or self.tokens.stat().st_size < size:
                return 0
            for path, end in ((self.tokens, size), (self.lengths, 4 * done)):
                os.truncate(path, end)
            with open(self.tokens, "rb") as f:
                while block := f.read(1 << 24):
                    self.sums.add(block)
        except (OSError, ValueError, KeyError, TypeError):  # no journal, or one that is damaged
            return 0
        return done if self.sums.as_json() == state["sums"] else 0

    def journal(self, done: int, tokens: Any, lengths: Any) -> None:
        for file in (tokens, lengths):
            file.flush()
            os.fsync(file.fileno())
        known = {"bytes": self.sums.size, "sums": self.sums.as_json(), "lengths_crc32": self.lengths_crc}
        state = {"sequences": done, **known}
        with atomic(self.state) as f:
            json.dump(state, f)

    def remove(self) -> None:
        for path in (self.state, self.tokens, self.lengths):
            path.unlink(missing_ok=True)
