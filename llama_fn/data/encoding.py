"""Texts to tokens on several processes, in the order of the texts whatever their number."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from llama_fn.data import tokenizer
from llama_fn.data.vocabularies import Tokenizer
from llama_fn.errors import UserError

BATCH_DOCUMENTS, BATCH_CHARS = 256, 1 << 20
WAITING = 4  # batches per process that are read ahead: they bound the memory


@dataclass(frozen=True)
class Frame:
    """What stands around each document: the tokens that begin and end it, -1 for none."""

    bos: int
    eos: int

    @classmethod
    def of(cls, pieces: Tokenizer, path: Path, bos: bool, eos: bool) -> Frame:
        """UserError where the tokenizer lacks one that is asked for."""
        for name, wanted, number in (("beginning", bos, pieces.bos_id()), ("end", eos, pieces.eos_id())):
            if wanted and number < 0:
                raise UserError(f"--tokenizer={path} has no token for the {name} of a document")
        return cls(pieces.bos_id() if bos else -1, pieces.eos_id() if eos else -1)


def framed(pieces: Tokenizer, frame: Frame, text: str) -> np.ndarray:
    """The tokens of a document, int32, between those of its frame."""
    first, last = ([each] if each >= 0 else [] for each in (frame.bos, frame.eos))
    return np.array([*first, *pieces.encode(text), *last], dtype=np.int32)


def encoded(texts: Iterable[str], path: Path, frame: Frame, workers: int) -> Iterator[np.ndarray]:
    """The tokens of each text, int32, between those of `frame`."""
    waiting: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
    # Children of a process that has imported this module and nothing else, so that no thread of ours is forked.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, _begin, (path, frame))
    try:
        for batch in _batches(texts):
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > WAITING * workers:
                yield from _apart(*waiting.popleft().result())
        while waiting:
            yield from _apart(*waiting.popleft().result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == BATCH_DOCUMENTS or size > BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _apart(tokens: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    begin = 0
    for end in ends.tolist():
        yield tokens[begin:end]
        begin = end


_HELD: list[tuple[Tokenizer, Frame]] = []


def _begin(path: Path, frame: Frame) -> None:
    """In a child: Ctrl-C is the parent's matter, and its death, however sudden, ends the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _HELD[:] = [(tokenizer.load(path), frame)]


def _end_with_parent() -> None:
    """The server that forks is this process's own parent, and lives as long as any child does."""
    if (parent := parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of several texts, and where each ends."""
    ((pieces, frame),) = _HELD
    parts = [framed(pieces, frame, text) for text in texts]
    return np.concatenate(parts), np.cumsum([len(part) for part in parts])
