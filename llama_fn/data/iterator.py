"""Batches in a fixed order from a position that is one number, prepared one ahead in a thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from llama_fn.data.samples import Samples
from llama_fn.errors import UserError
from llama_fn.train_step import Batch


class BatchIterator:
    """Global batch i holds samples [i * size, (i + 1) * size) whatever the microbatches or devices.

    `consumed` counts samples handed out: with the config it is the whole state.
    """

    def __init__(self, samples: Samples, size: int, microbatches: int, vocab_size: int, consumed: int = 0) -> None:
        self.samples, self.size, self.microbatches, self.vocab_size = samples, size, microbatches, vocab_size
        self.consumed = consumed
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: Future[Batch] | None = None
        self._prefetch()

    def _prefetch(self) -> None:
        more = self.consumed + self.size <= self.samples.count
        self._next = self._worker.submit(self.batch_at, self.consumed) if more else None

    def batch_at(self, first: int) -> Batch:
        """The batch of samples first..first+size."""
        rows = np.stack([self.samples[k] for k in range(first, first + self.size)])
        if rows.max() >= self.vocab_size or rows.min() < 0:
            raise UserError(
                f"{self.samples.data.bin_path} holds token {int(rows.max())}, --model.vocab_size is {self.vocab_size}: "
                "the data was made with another tokenizer"
            )
        shaped = torch.from_numpy(rows).reshape(self.microbatches, self.size // self.microbatches, -1)
        tokens, targets = shaped[..., :-1].contiguous(), shaped[..., 1:].contiguous()
        return Batch(tokens, targets, torch.ones(tokens.shape, dtype=torch.float32))

    def __next__(self) -> Batch:
        if self._next is None:
            raise StopIteration
        batch = self._next.result()
        self.consumed += self.size
        self._prefetch()
        return batch

    def state(self) -> dict[str, int]:
        return {"consumed_samples": self.consumed}

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
