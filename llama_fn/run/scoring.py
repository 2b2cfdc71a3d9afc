"""The likelihood of given continuations, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from llama_fn.compiler import stages
from llama_fn.model import llama
from llama_fn.model.arrays import ArrayInfo
from llama_fn.model.score import score
from llama_fn.run.decoding import BUCKET, Decoder

Row = tuple[Sequence[int], Sequence[int]]  # what is read first, and what is to be scored behind it


class Scorer:
    """Scores with a decoder's model, in `batch` rows of at most the decoder's length."""

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self.decoder, self.batch = decoder, batch

    def score(self, rows: Sequence[Row]) -> Iterator[tuple[int, float, bool]]:
        """For each row, in any order: its number, the sum of its continuation's log-likelihoods in nats, and whether
        each token of it was the likeliest. Rows that are too long lose their beginning. ValueError for a row with
        nothing before its continuation, or a continuation longer than the decoder's length."""
        for number, (context, continuation) in enumerate(rows):
            if not context or not 0 < len(continuation) <= self.decoder.length:
                raise ValueError(f"row {number}: {len(context)} tokens, then {len(continuation)} to score")
        longest_first = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))  # memory runs out at once
        for start in range(0, len(rows), self.batch):
            numbers = longest_first[start : start + self.batch]
            yield from self._batch(numbers, [rows[i] for i in numbers])

    def _batch(self, numbers: list[int], rows: list[Row]) -> Iterator[tuple[int, float, bool]]:
        whole = [[*context, *continuation][-self.decoder.length - 1 :] for context, continuation in rows]
        length = min(-(-max(len(ids) - 1 for ids in whole) // BUCKET) * BUCKET, self.decoder.length)
        tokens, targets = (torch.zeros(self.batch, length, dtype=torch.int64) for _ in range(2))
        for i, ids in enumerate(whole):
            tokens[i, : len(ids) - 1], targets[i, : len(ids) - 1] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        device = self.decoder.device
        nll, likeliest = self._step(length)(self.decoder.params, tokens.to(device), targets.to(device))
        nll, right = nll.double().cpu(), likeliest.cpu() == targets
        for i, (number, ids, (_, continuation)) in enumerate(zip(numbers, whole, rows, strict=True)):
            scored = slice(len(ids) - 1 - len(continuation), len(ids) - 1)
            yield number, -float(nll[i, scored].sum()), bool(right[i, scored].all())

    def _step(self, length: int) -> stages.Compiled:
        cfg, ids = self.decoder.cfg, ArrayInfo((self.batch, length), torch.int64)

        def scored(params: llama.Params, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return score(params, tokens, targets, cfg=cfg)

        return self.decoder.compiled_once((score, self.batch, length), scored, self.decoder.infos, ids, ids)
