"""Batches in a fixed order from a position that is one number, prepared one ahead in a thread."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from llama_fn.data.blend import Blend
from llama_fn.data.rampup import Rampup
from llama_fn.data.samples import Samples
from llama_fn.data.skips import Ranges, after
from llama_fn.errors import UserError
from llama_fn.model.train_step import Batch

log = logging.getLogger("llama_fn.data")
HEAD_START_S = 2e-3  # what the loop takes from a batch to the start of its step, and some


class BatchIterator:
    """Global batch i holds samples [i * size, (i + 1) * size) whatever the microbatches or devices.

    Of each microbatch only `rows` are read and returned: this process's own (default: all). `consumed` counts the
    samples handed out to all of them or `skipped`, `tokens` the tokens handed out: with the config they are the whole
    state. A batch has nothing of a range that is skipped: the next one begins behind it. `segments` and `mask_ends`: as
    the flags say. `rampup`: how the batches grow to `size`, in whole microbatches.
    """

    def __init__(
        self,
        samples: Samples | Blend,
        size: int,
        microbatches: int,
        vocab_size: int,
        consumed: int = 0,
        tokens: int = 0,
        rows: slice = slice(None),
        skipped: Ranges = (),
        segments: bool = False,
        mask_ends: bool = False,
        rampup: Rampup | None = None,
    ) -> None:
        self.samples, self.microbatch, self.vocab_size = samples, size // microbatches, vocab_size
        self.rampup = rampup or Rampup(size, 0, 0, size)
        self.consumed, self.tokens, self.rows, self.skipped = consumed, tokens, rows, skipped
        self.segments, self.mask_ends = segments, mask_ends
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._asked = threading.Event()  # somebody waits for the batch
        self._next: Future[Batch] | None = None
        self._prefetch()

    def _prefetch(self) -> None:
        self._size = self.rampup.size(self.consumed)
        self._first = after(self.consumed, self._size, self.skipped)
        more = self._first + self._size <= self.samples.count
        self._next = self._worker.submit(self._prepared, self._first, self._size) if more else None

    def batch_at(self, first: int, size: int) -> Batch:
        """The batch of samples first..first+size."""
        wanted = np.arange(first, first + size).reshape(-1, self.microbatch)[:, self.rows]
        samples = [self.samples.documents(int(k)) for k in wanted.flat]
        rows = np.stack([np.concatenate(parts).astype(np.int64) for parts in samples])
        self._refuse_others(rows, wanted)
        shaped = torch.from_numpy(rows).reshape(*wanted.shape, -1)
        tokens, targets = shaped[..., :-1].contiguous(), shaped[..., 1:].contiguous()
        mask = torch.ones(tokens.shape, dtype=torch.float32)
        if not (self.segments or self.mask_ends):
            return Batch(tokens, targets, mask)
        begins = torch.from_numpy(np.stack([_begins(parts) for parts in samples])).reshape(shaped.shape)
        if self.mask_ends:
            mask[begins[..., 1:] != begins[..., :-1]] = 0.0
        return Batch(tokens, targets, mask, begins[..., :-1].contiguous() if self.segments else None)

    def _refuse_others(self, rows: np.ndarray, wanted: np.ndarray) -> None:
        """UserError for a token that is none of the model's."""
        if rows.max() >= self.vocab_size or rows.min() < 0:
            wrong = int(rows.min() if rows.min() < 0 else rows.max())
            at = int(wanted.flat[int(np.argwhere(rows == wrong)[0][0])])
            raise UserError(
                f"{self.samples.file(at)} holds token {wrong}, --model.vocab_size is {self.vocab_size}: the data was "
                "made with another tokenizer"
            )

    def _prepared(self, first: int, size: int) -> Batch:
        """A batch, for the worker, which lets the loop start its step first: two threads of Python take turns."""
        self._asked.wait(HEAD_START_S)
        return self.batch_at(first, size)

    def __next__(self) -> Batch:
        if self._next is None:
            raise StopIteration
        self._asked.set()
        batch = self._next.result()
        self._asked.clear()
        if self._first > self.consumed:
            log.info("data: samples %d to %d are skipped", self.consumed, self._first)
        self.consumed, size = self._first + self._size, self._size
        self.tokens += size * self.samples.seq_len
        self._prefetch()
        if self._size != size:
            log.info("data: batches of %d samples after sample %d", self._size, self.consumed)
        return batch

    def counts(self) -> dict[str, int]:
        """How many samples and tokens were handed out so far."""
        return {"consumed_samples": self.consumed, "consumed_tokens": self.tokens}

    def state(self) -> dict[str, Any]:
        """The same, and what else a later run needs to go on, for a checkpoint."""
        return {**self.counts(), **self.samples.state(self.consumed)}

    def close(self) -> None:
        """End the thread that prepares batches."""
        self._asked.set()
        self._worker.shutdown(wait=True, cancel_futures=True)


def _begins(parts: list[np.ndarray]) -> np.ndarray:
    """For each token of a row, where the part of a document that it is in begins, int64."""
    lengths = [len(part) for part in parts]
    return np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
