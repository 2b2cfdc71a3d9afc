"""Megatron's sample order for one source: which tokens are sample k, given seed, length and count.

Follows megatron-core's GPTDataset: documents shuffled over all epochs together (the last epoch apart where it is
used by less than 80 %), cut into samples of seq_len + 1 tokens that overlap by one, and the samples shuffled. The order
is made in memory from a few NumPy calls; a long one is kept on disk (orders.py).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from llama_fn.config_checks import split_weights
from llama_fn.data import orders
from llama_fn.data.indexed import IndexedDataset
from llama_fn.errors import UserError
from llama_fn.hardware import available_bytes

SEPARATE_BELOW = 0.80


def split_ranges(split: str, sequences: int) -> list[tuple[int, int]]:
    """[(first, last)) of train, validation and test sequences for weights such as "949,50,1"."""
    weights = split_weights(split)
    total = sum(weights)
    ends = np.cumsum([w / total for w in weights])
    marks = [0, *(round(float(end) * float(sequences)) for end in ends)]
    return list(itertools.pairwise(marks))


class Samples:
    """Sample k (0 <= k < count) as seq_len + 1 tokens. `cache`: folder for orders that are long."""

    def __init__(
        self, data: IndexedDataset, part: tuple[int, int], seq_len: int, count: int, seed: int, name: str,
        cache: Path | None = None,
    ) -> None:  # fmt: skip
        per_epoch = int(data.lengths[part[0] : part[1]].sum(dtype=np.int64))
        if per_epoch < 2:
            raise UserError(
                f"{data.bin_path}: the {name} part has {part[1] - part[0]} of {len(data)} documents and {per_epoch} "
                "tokens; it needs at least 2 tokens. Change --data.split or give more data"
            )
        epochs = -(-(count * seq_len + 1) // per_epoch)
        before_last = ((epochs - 1) * per_epoch - 1) // seq_len
        separate = epochs > 1 and count - before_last < int(SEPARATE_BELOW * ((per_epoch - 1) // seq_len))
        total = (epochs * per_epoch - 1) // seq_len
        entries = epochs * (part[1] - part[0]) + total

        def make() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            _refuse_too_long(data, name, epochs, part[1] - part[0], total)
            random = np.random.RandomState(seed)
            sequences = np.arange(part[0], part[1], dtype=np.int32)
            if separate:
                order = [_repeat_shuffled(sequences, epochs - 1, random), _repeat_shuffled(sequences, 1, random)]
                sequences = np.concatenate(order)
            else:
                sequences = _repeat_shuffled(sequences, epochs, random)
            ends = np.cumsum(data.lengths[sequences], dtype=np.int64)
            return sequences, ends, _shuffled_parts(before_last if separate else total, total, random)

        if cache is None or entries < orders.LEAST:
            self.sequences, self.ends, self.shuffle = make()
        else:
            made_of = {
                "data": data.fingerprint["index_crc32"], "part": part, "seq_len": seq_len, "epochs": epochs,
                "separate": separate, "seed": seed,
            }  # fmt: skip
            self.sequences, self.ends, self.shuffle = orders.kept(cache, made_of, make)
        self.data, self.seq_len, self.count, self.epochs = data, seq_len, count, epochs
        self.per_epoch = (per_epoch - 1) / seq_len  # samples, not whole ones

    def file(self, k: int) -> Path:
        """Where sample k comes from."""
        return self.data.bin_path

    def state(self, consumed: int) -> dict[str, Any]:
        """Nothing: the number of samples says where one is."""
        return {}

    def row(self, i: int) -> tuple[int, int]:
        """(document position, offset) of flat token i * seq_len."""
        flat = i * self.seq_len
        position = int(np.searchsorted(self.ends, flat, side="right"))
        return position, flat - (int(self.ends[position - 1]) if position else 0)

    def __getitem__(self, k: int) -> np.ndarray:
        """int64 [seq_len + 1]."""
        return np.concatenate(self.documents(k)).astype(np.int64)

    def documents(self, k: int) -> list[np.ndarray]:
        """The parts of documents that make sample k, one after the other."""
        position, offset = self.row(int(self.shuffle[k]))
        parts, missing = [], self.seq_len + 1
        while missing:
            sequence = int(self.sequences[position])
            tokens = self.data.read(sequence, offset, min(int(self.data.lengths[sequence]), offset + missing))
            parts.append(tokens)
            missing -= len(tokens)
            position, offset = position + 1, 0
        return [part for part in parts if len(part)]


def _refuse_too_long(data: IndexedDataset, name: str, epochs: int, sequences: int, samples: int) -> None:
    """UserError where the order of documents and samples, which Megatron's way shuffles as a whole, needs more memory
    than is free."""
    needed = epochs * sequences * (4 + 8 + 4) + samples * 8
    if needed > (free := available_bytes()):
        raise UserError(
            f"{data.bin_path}: the {name} samples of this run go over {epochs} epochs; the order of {samples} samples "
            f"and {epochs * sequences} documents takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Lower "
            "--run.steps or --data.global_batch_size, or give more data"
        )


def _repeat_shuffled(sequences: np.ndarray, epochs: int, random: np.random.RandomState) -> np.ndarray:
    order = np.tile(sequences, epochs)
    random.shuffle(order)
    return order


def _shuffled_parts(first: int, total: int, random: np.random.RandomState) -> np.ndarray:
    """0..first shuffled, then first..total shuffled."""
    dtype = np.int64 if total >= np.iinfo(np.uint32).max - 1 else np.uint32
    parts = []
    for start, stop in ((0, first), (first, total)):
        part = np.arange(start, stop, dtype=dtype)
        if start < stop:
            random.shuffle(part)
        parts.append(part)
    return np.concatenate(parts)
