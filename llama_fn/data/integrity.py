"""What a .bin/.idx pair promises, held against what its files are, before the first token is used.

An index is redundant: its offsets are sums of its lengths, its documents rise from 0 to the number of sequences, and
its lengths add up to the size of the .bin. All of that is checked at every start (`check_index`). What the tokens are,
an index cannot tell: files that this project wrote have sums of every block beside them (SUMS), and of any file the
smallest and largest token are looked up. That reads all of the data, so it is done once, and remembered (`verified`).
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_fn.errors import UserError
from llama_fn.files import atomic

log = logging.getLogger("llama_fn.data")
SUMS = ".sums.json"
BLOCK_BYTES = 1 << 26
_SEQUENCES = 1 << 20  # checked at a time


def check_index(
    idx: Path, bin_path: Path, lengths: np.ndarray, offsets: np.ndarray, documents: np.ndarray, itemsize: int
) -> None:
    """UserError naming the first field that contradicts the others."""
    end, size = 0, bin_path.stat().st_size
    for first in range(0, len(lengths), _SEQUENCES):
        counts = lengths[first : first + _SEQUENCES].astype(np.int64)
        _refuse(idx, first, counts < 0, lambda i: f"has the length {lengths[i]}")
        ends = end + np.cumsum(counts) * itemsize
        begins = np.concatenate([[end], ends[:-1]])
        wrong = offsets[first : first + _SEQUENCES] != begins
        _refuse(
            idx, first, wrong,
            lambda i, begins=begins, first=first: (
                f"begins at byte {offsets[i]} of {bin_path.name}, where the one before it ends at {begins[i - first]}"
            ),
        )  # fmt: skip
        end = int(ends[-1])
        if end > size:
            break
    if size < end:
        raise UserError(f"{bin_path} is truncated: {idx.name} needs {end} bytes, it has {size}; copy it again")
    if size > end:
        raise UserError(
            f"{bin_path} has {size} bytes, {idx.name} lists {end} of them: the two files do not belong together. Copy "
            "both again, or make them anew"
        )
    falls = np.flatnonzero(documents[1:] < documents[:-1])
    if documents[0] != 0 or documents[-1] != len(lengths) or falls.size:
        at = int(falls[0]) + 1 if falls.size else 0 if documents[0] else len(documents) - 1
        raise UserError(
            f"{idx}: document {at} begins at sequence {documents[at]}; documents must rise from 0 to {len(lengths)}. "
            "Copy it again, or make it anew"
        )


def _refuse(idx: Path, first: int, wrong: np.ndarray, what: Any) -> None:
    bad = np.flatnonzero(wrong)
    if bad.size:
        i = first + int(bad[0])
        raise UserError(f"{idx}: sequence {i} {what(i)}. The file is damaged: copy it again, or make it anew")


@dataclass
class BlockSums:
    """Size and CRC-32 of every block of a file that is written, or read, from its beginning."""

    size: int = 0
    blocks: list[int] | None = None

    def add(self, data: bytes | memoryview) -> None:
        """Count the bytes that come next in the file."""
        self.blocks = self.blocks if self.blocks is not None else []
        view = memoryview(data).cast("B")
        while view:
            room = BLOCK_BYTES - self.size % BLOCK_BYTES
            if room == BLOCK_BYTES:
                self.blocks.append(0)
            self.blocks[-1] = zlib.crc32(view[:room], self.blocks[-1])
            self.size += len(view[:room])
            view = view[room:]

    def as_json(self) -> list[Any]:
        """[size in bytes, CRC-32 per block]."""
        return [self.size, self.blocks or []]


def sums_path(prefix: Path) -> Path:
    """Where the sums of a prefix's files are kept."""
    return prefix.with_name(prefix.name + SUMS)


def write_sums(prefix: Path, files: dict[str, BlockSums]) -> None:
    """The sums of files beside `prefix`, by name."""
    listed = {name: sums.as_json() for name, sums in files.items()}
    with atomic(sums_path(prefix)) as f:
        json.dump({"block_bytes": BLOCK_BYTES, "files": listed, "crc32": _crc(listed)}, f)


def read_sums(prefix: Path) -> dict[str, Any]:
    """[size, CRC-32 of every block] by the name of the file; empty where nobody wrote sums."""
    path = sums_path(prefix)
    try:
        listed = json.loads(path.read_bytes())
        good = listed["crc32"] == _crc(listed["files"]) and listed["block_bytes"] == BLOCK_BYTES
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        good = False
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not good:
        raise UserError(
            f"{path} is damaged, and so does not tell whether the data beside it is what was written. Delete "
            f"{prefix.name}.* to make it anew, or this file alone to use the data unchecked"
        )
    files: dict[str, Any] = listed["files"]
    return files


def _crc(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def check_file(path: Path, listed: list[Any], each: Any = lambda block: None) -> None:
    """UserError naming the first block of a file that has not its listed sum; `each` sees every block."""
    size, blocks = listed
    size_now, said = path.stat().st_size, time.monotonic()
    if size_now != size:
        raise UserError(f"{path} has {size_now} bytes and was written with {size}: it is damaged. {_anew(path)}")
    with open(path, "rb") as f:
        for n, crc in enumerate(blocks):
            block = f.read(BLOCK_BYTES)
            if zlib.crc32(block) != crc:
                raise UserError(
                    f"{path} is damaged between byte {n * BLOCK_BYTES} and {n * BLOCK_BYTES + len(block)}: another "
                    f"checksum than when it was written. {_anew(path)}"
                )
            each(block)
            said = _progress(path, (n + 1) * BLOCK_BYTES, size, said)


def _anew(path: Path) -> str:
    return f"Delete it with the other files of its name in {path.parent} and start again, or bring back a copy"


def _progress(path: Path, done: int, size: int, said: float) -> float:
    now = time.monotonic()
    if now - said > 5:
        log.info("verifying %s: %.1f of %.1f GB", path, min(done, size) / 1e9, size / 1e9)
        return now
    return said


@dataclass
class Extremes:
    """The smallest and largest token of what was seen."""

    smallest: int = 0
    largest: int = -1

    def add(self, tokens: np.ndarray) -> None:
        """Look at more tokens."""
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            self.smallest, self.largest = min(self.smallest, low), max(self.largest, high)


def verified(prefix: Path, files: Iterable[Path], tokens: np.ndarray, memory: Path) -> Extremes:
    """The extremes of `tokens`, from a look at all of them and at every sum that there is; or as remembered in the file
    `memory`, if a run has looked since the files were last changed."""
    bin_path, idx = files
    stamp = [[s.st_size, s.st_mtime_ns] for s in (bin_path.stat(), idx.stat())]
    remembered = _remembered(memory)
    known = remembered.get(str(bin_path.resolve()), {})
    if isinstance(known, dict) and known.get("stamp") == stamp:
        return Extremes(known["smallest"], known["largest"])
    listed, extremes = read_sums(prefix), Extremes()
    if idx.name in listed:
        check_file(idx, listed[idx.name])
    if bin_path.name in listed:
        check_file(bin_path, listed[bin_path.name], lambda block: extremes.add(np.frombuffer(block, tokens.dtype)))
    else:
        step, said = BLOCK_BYTES // tokens.itemsize, time.monotonic()
        for first in range(0, len(tokens), step):
            extremes.add(tokens[first : first + step])
            said = _progress(bin_path, first * tokens.itemsize, bin_path.stat().st_size, said)
    remembered[str(bin_path.resolve())] = {"stamp": stamp, "smallest": extremes.smallest, "largest": extremes.largest}
    with atomic(memory) as f:
        json.dump(remembered, f)
    return extremes


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        entries = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def refuse_other_tokens(
    bin_path: Path, tokens: np.ndarray, offsets: np.ndarray, extremes: Extremes, vocab_size: int
) -> None:
    """UserError naming the sequence of the first token that no row of the embedding is for."""
    if extremes.smallest >= 0 and extremes.largest < vocab_size:
        return
    step = BLOCK_BYTES // tokens.itemsize
    for first in range(0, len(tokens), step):
        part = tokens[first : first + step]
        bad = np.flatnonzero((part < 0) | (part >= vocab_size))
        if bad.size:
            at = first + int(bad[0])
            sequence = int(np.searchsorted(offsets, at * tokens.itemsize, side="right")) - 1
            raise UserError(
                f"{bin_path}: sequence {sequence} holds token {tokens[at]}, --model.vocab_size is {vocab_size}: the "
                "data was made with another tokenizer, or is damaged"
            )
