"""From the data flags to datasets: tokenize once into the work folder, then open what is there."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm

from llama_fn.config import Config
from llama_fn.data import corpus, indexed, tokenizer
from llama_fn.data.samples import Samples, split_ranges
from llama_fn.errors import UserError

log = logging.getLogger("llama_fn.data")
BATCH_DOCUMENTS = 256


def datasets(cfg: Config, workdir: Path) -> tuple[Samples, Samples | None]:
    """Train samples for the whole run, and validation samples for one validation (None without any)."""
    data = indexed.IndexedDataset(_prefix(cfg, workdir))
    train, valid, _ = split_ranges(cfg.data.split, len(data))
    seq_len, size = cfg.data.seq_len, cfg.data.global_batch_size
    samples = Samples(data, train, seq_len, cfg.run.steps * size, cfg.run.seed, "train")
    log.info(
        "data: %s, %d documents, %d tokens; train %d samples over %d epochs",
        data.bin_path, len(data), int(data.lengths.sum(dtype=np.int64)), samples.count, samples.epochs,
    )  # fmt: skip
    if not cfg.run.eval_every:
        return samples, None
    if valid[0] == valid[1]:
        log.warning("--data.split=%s gives no validation document of %d: no validation", cfg.data.split, len(data))
        return samples, None
    return samples, Samples(data, valid, seq_len, cfg.run.eval_batches * size, cfg.run.seed, "validation")


def _prefix(cfg: Config, workdir: Path) -> Path:
    """The prefix of a .bin/.idx pair: the user's own, or the corpus tokenized into the work folder."""
    given = Path(cfg.data.path.removesuffix(".bin").removesuffix(".idx")) if cfg.data.path else None
    if given is not None and any(path.exists() for path in indexed.files(given)):
        return given
    folder = workdir / "data"
    model_path = Path(cfg.data.tokenizer) if cfg.data.tokenizer else folder / "tokenizer.model"
    if not cfg.data.tokenizer and not model_path.exists():
        log.info("tokenizer: training %d pieces on %s", cfg.model.vocab_size, _corpus_name(cfg))
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.train(corpus.documents(cfg.data.path, cfg.data.jsonl_key), cfg.model.vocab_size, model_path)
    pieces = tokenizer.load(model_path)
    tokenizer.check_vocabulary(pieces, cfg.model.vocab_size, model_path)
    source = f"{cfg.data.path}\0{cfg.data.jsonl_key}".encode() + model_path.read_bytes()
    prefix = folder / f"llama_{hashlib.sha256(source).hexdigest()[:12]}_text_document"
    if not indexed.exists(prefix):
        _tokenize(cfg, pieces, prefix)
    return prefix


def _corpus_name(cfg: Config) -> str:
    return cfg.data.path or "Python's standard library"


def _tokenize(cfg: Config, pieces: spm.SentencePieceProcessor, prefix: Path) -> None:
    start = time.monotonic()
    log.info("tokenizing %s into %s", _corpus_name(cfg), prefix)
    count, tokens = indexed.write(prefix, _sequences(cfg, pieces), indexed.best_dtype(cfg.model.vocab_size))
    if count < 3:
        log.warning("the corpus has only %d documents; --data.split may leave parts of it empty", count)
    log.info("tokenized %d documents, %d tokens in %.1f s", count, tokens, time.monotonic() - start)


def _sequences(cfg: Config, pieces: spm.SentencePieceProcessor) -> Iterator[np.ndarray]:
    """Token ids of each document, closed by the end-of-sequence token."""
    if pieces.eos_id() < 0:
        raise UserError(f"--data.tokenizer={cfg.data.tokenizer} has no end-of-sequence piece; documents need one")
    pending: list[str] = []
    done, said = 0, time.monotonic()

    def encode() -> Iterator[np.ndarray]:
        for ids in pieces.encode(pending, num_threads=0):
            yield np.array([*ids, pieces.eos_id()], dtype=np.int64)

    for text in corpus.documents(cfg.data.path, cfg.data.jsonl_key):
        pending.append(text)
        done += len(text)
        if len(pending) == BATCH_DOCUMENTS:
            yield from encode()
            pending.clear()
        if time.monotonic() - said > 5:
            log.info("tokenizing: %.0f million characters done", done / 1e6)
            said = time.monotonic()
    yield from encode()
