"""From the data flags to a dataset: tokenize once into the work folder, then open and verify what is there."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece as spm

from llama_fn.config import Config
from llama_fn.data import corpus, indexed, tokenizer, writer
from llama_fn.data.samples import Samples, split_ranges
from llama_fn.errors import UserError
from llama_fn.signals import interruptible

log = logging.getLogger("llama_fn.data")
BATCH_DOCUMENTS, BATCH_CHARS = 256, 1 << 22  # encoded in one call, which nothing interrupts
VERIFIED = "verified.json"


@dataclass(frozen=True)
class Parts:
    """A dataset, and which of its sequences are for training and for validation; `valid` is None without any."""

    data: indexed.IndexedDataset
    train: tuple[int, int]
    valid: tuple[int, int] | None

    def train_samples(self, cfg: Config, consumed: int, left: int) -> Samples:
        """The samples of a run that has consumed some and has `left` iterations to go."""
        count = consumed + left * cfg.data.global_batch_size
        samples = Samples(self.data, self.train, cfg.data.seq_len, count, cfg.run.seed, "train")
        log.info(
            "data: %s, %d documents, %d tokens; train %d samples over %d epochs",
            self.data.bin_path, len(self.data), len(self.data.tokens), samples.count, samples.epochs,
        )  # fmt: skip
        return samples

    def valid_samples(self, cfg: Config) -> Samples | None:
        """The samples of one validation."""
        count = cfg.run.eval_batches * cfg.data.global_batch_size
        if self.valid is None:
            return None
        return Samples(self.data, self.valid, cfg.data.seq_len, count, cfg.run.seed, "validation")


def check(cfg: Config) -> None:
    """UserError for data or a tokenizer that cannot be used, as far as that is known before anything is written."""
    prefix = given_prefix(cfg.data.path)
    if prefix is not None:
        indexed.IndexedDataset(prefix)
        return
    next(corpus.documents(cfg.data.path, cfg.data.jsonl_key))
    if cfg.data.tokenizer:
        _tokenizer(cfg, Path(cfg.data.tokenizer))


def tokenizer_of(cfg: Config, workdir: Path) -> spm.SentencePieceProcessor | None:
    """That of the data, once they are there; None where they are tokens and no tokenizer is named."""
    if given_prefix(cfg.data.path) is None or cfg.data.tokenizer:
        return _tokenizer(cfg, _tokenizer_path(cfg, workdir / "data", _text(cfg)))
    return None


def open_parts(cfg: Config, workdir: Path) -> Parts:
    """The data that cfg names, tokenized if it is text, verified, and taken apart."""
    data = indexed.IndexedDataset(_prefix(cfg, workdir))
    if cfg.data.verify:
        data.verify(cfg.model.vocab_size, workdir / "data" / VERIFIED)
    train, valid, _ = split_ranges(cfg.data.split, len(data))
    if not cfg.run.eval_every:
        return Parts(data, train, None)
    if valid[0] == valid[1]:
        log.warning("--data.split=%s gives no validation document of %d: no validation", cfg.data.split, len(data))
        return Parts(data, train, None)
    return Parts(data, train, valid)


def given_prefix(path: str) -> Path | None:
    """The prefix of the .bin/.idx pair that --data.path names, or None where it names text. UserError where both are
    there."""
    if not path:
        return None
    whole = Path(os.path.abspath(path))
    prefix = whole.with_name(whole.name.removesuffix(".bin").removesuffix(".idx"))
    if prefix != whole:
        return prefix
    pair = [file.is_file() for file in indexed.files(whole)] if whole.name else [False]
    if all(pair) and whole.exists():
        raise UserError(
            f"--data.path={path} is {'a folder' if whole.is_dir() else 'a file'}, and {whole.name}.bin and .idx lie "
            f"beside it: write {path.rstrip('/')}.bin for those, or move them"
        )
    return whole if any(pair) and not whole.exists() else None


def _prefix(cfg: Config, workdir: Path) -> Path:
    """The prefix of a .bin/.idx pair: the user's own, or the corpus tokenized into the work folder.

    What is made is named after what it is made of, so that another corpus, or one that has changed, is another file.
    """
    given = given_prefix(cfg.data.path)
    if given is not None:
        return given
    folder, text = workdir / "data", _text(cfg)
    model_path = _tokenizer_path(cfg, folder, text)
    if not cfg.data.tokenizer and not model_path.exists():
        log.info("tokenizer: training %d pieces on %s", cfg.model.vocab_size, _corpus_name(cfg))
        folder.mkdir(parents=True, exist_ok=True)
        texts = corpus.documents(cfg.data.path, cfg.data.jsonl_key)
        interruptible(lambda: tokenizer.train(texts, cfg.model.vocab_size, model_path))
    pieces = _tokenizer(cfg, model_path)
    prefix = folder / f"llama_{_name(text.encode() + model_path.read_bytes())}_text_document"
    if not indexed.exists(prefix):
        _tokenize(cfg, pieces, prefix)
    return prefix


def _text(cfg: Config) -> str:
    """What the corpus is."""
    return f"{corpus.identity(cfg.data.path)}\0{cfg.data.jsonl_key}"


def _tokenizer_path(cfg: Config, folder: Path, text: str) -> Path:
    """Of the tokenizer that is given, or trained on `text`."""
    if cfg.data.tokenizer:
        return Path(cfg.data.tokenizer)
    return folder / f"tokenizer_{_name(f'{text}{cfg.model.vocab_size}'.encode())}.model"


def _name(of: bytes) -> str:
    return hashlib.sha256(of).hexdigest()[:12]


def _tokenizer(cfg: Config, path: Path) -> spm.SentencePieceProcessor:
    pieces = tokenizer.load(path)
    tokenizer.check_vocabulary(pieces, cfg.model.vocab_size, path)
    if pieces.eos_id() < 0:
        raise UserError(f"--data.tokenizer={path} has no end-of-sequence piece; documents need one")
    return pieces


def _corpus_name(cfg: Config) -> str:
    return cfg.data.path or "Python's standard library"


def _tokenize(cfg: Config, pieces: spm.SentencePieceProcessor, prefix: Path) -> None:
    start = time.monotonic()
    log.info("tokenizing %s into %s", _corpus_name(cfg), prefix)
    count, tokens = writer.write_on(
        prefix,
        lambda done: _sequences(cfg, pieces, done),
        indexed.best_dtype(cfg.model.vocab_size),
        lambda done: log.info("tokenizing: %d documents were done before; going on", done),
    )
    if count < 3:
        log.warning("the corpus has only %d documents; --data.split may leave parts of it empty", count)
    log.info("tokenized %d documents, %d tokens in %.1f s", count, tokens, time.monotonic() - start)


def _sequences(cfg: Config, pieces: spm.SentencePieceProcessor, done: int) -> Iterator[np.ndarray]:
    """Token ids of each document but the first `done`, closed by the end-of-sequence token."""
    pending: list[str] = []
    count, waiting, said = 0, 0, time.monotonic()

    def encode() -> Iterator[np.ndarray]:
        for ids in pieces.encode(pending, num_threads=0):
            yield np.array([*ids, pieces.eos_id()], dtype=np.int64)

    for text in islice(corpus.documents(cfg.data.path, cfg.data.jsonl_key), done, None):
        pending.append(text)
        count += len(text)
        waiting += len(text)
        if len(pending) == BATCH_DOCUMENTS or waiting > BATCH_CHARS:
            yield from encode()
            pending.clear()
            waiting = 0
        if time.monotonic() - said > 5:
            log.info("tokenizing: %.0f million characters done", count / 1e6)
            said = time.monotonic()
    yield from encode()
