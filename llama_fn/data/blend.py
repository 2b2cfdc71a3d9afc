"""Samples of several sources in Megatron's order: at every sample, the source that is furthest behind its weight.

Follows megatron-core's BlendedDataset (build_blending_indices, and the sizes that BlendedMegatronDatasetBuilder asks of
each source). The order is made in chunks as it is needed and is the same whatever the number of samples, so nothing is
kept on disk: where a chunk begins is one number for each source.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_fn.data.samples import Samples

log = logging.getLogger("llama_fn.data")
CHUNK = 1 << 16
SURPLUS = 0.005  # of the samples that a source is asked for


def normalized(weights: Sequence[float]) -> list[float]:
    """To a sum of 1, twice, as Megatron does: the last bits decide ties."""
    once = np.array(weights, dtype=np.float64)
    once = once / once.sum()
    return [float(w) for w in once / once.sum()]


def requested(weights: Sequence[float], count: int) -> list[int]:
    """How many samples of each source make `count` of the blend, with a margin."""
    return [math.ceil(math.ceil(count * w) * (1 + SURPLUS)) for w in normalized(weights)]


class Order:
    """Which source sample k comes from, and which of that source's samples it is. `known`: from `state`, where a chunk
    begins, so that none before it is made again."""

    def __init__(self, weights: Sequence[float], known: Mapping[str, Any] | None = None) -> None:
        self.weights = normalized(weights)
        self.starts: dict[int, list[int]] = {0: [0] * len(self.weights)}  # by chunk: samples taken of each before it
        if known:
            self.starts[int(known["chunk"])] = list(known["taken"])
        self.number, self.chunk = -1, (np.empty(0, np.int16), np.empty(0, np.int64))

    def __getitem__(self, k: int) -> tuple[int, int]:
        if k // CHUNK != self.number:
            self.number, self.chunk = k // CHUNK, self._chunk(k // CHUNK)
        sources, indices = self.chunk
        return int(sources[k % CHUNK]), int(indices[k % CHUNK])

    def state(self, k: int) -> dict[str, Any]:
        """Where the chunk of sample k, up to which samples were made, begins."""
        return {"chunk": k // CHUNK, "taken": self.starts[k // CHUNK]}

    def _chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        said = time.monotonic()
        for each in range(max(n for n in self.starts if n <= number), number + 1):
            made = self._made(each)
            if time.monotonic() - said > 5:
                log.info("mixture: order of %d of %d samples", each * CHUNK, number * CHUNK)
                said = time.monotonic()
        return made

    def _made(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One chunk. Plain Python: a sample depends on the one before, and takes a microsecond."""
        weights, taken = self.weights, list(self.starts[number])
        others = range(1, len(weights))
        sources, indices = [0] * CHUNK, [0] * CHUNK
        for i in range(CHUNK):
            at = float(max(number * CHUNK + i, 1))
            best, most = 0, weights[0] * at - taken[0]
            for j in others:
                if (behind := weights[j] * at - taken[j]) > most:
                    best, most = j, behind
            sources[i], indices[i] = best, taken[best]
            taken[best] += 1
        self.starts[number + 1] = taken
        return np.array(sources, np.int16), np.array(indices, np.int64)


class Blend:
    """Sample k (0 <= k < count) of a mixture, as Samples of one source gives it."""

    def __init__(
        self, parts: Sequence[Samples], weights: Sequence[float], count: int, known: Mapping[str, Any] | None = None
    ) -> None:
        self.parts, self.count, self.seq_len = parts, count, parts[0].seq_len
        self.order = Order(weights, known)

    def __getitem__(self, k: int) -> np.ndarray:
        """int64 [seq_len + 1]."""
        source, index = self.order[k]
        return self.parts[source][index]

    def documents(self, k: int) -> list[np.ndarray]:
        """The parts of documents that make sample k."""
        source, index = self.order[k]
        return self.parts[source].documents(index)

    def file(self, k: int) -> Path:
        """Where sample k comes from."""
        return self.parts[self.order[k][0]].data.bin_path

    def state(self, consumed: int) -> dict[str, Any]:
        """What a later run needs to go on behind so many samples, besides their number."""
        return {"blend": self.order.state(consumed)}
