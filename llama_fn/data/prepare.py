"""From the data flags to .bin/.idx: what is text is tokenized once, into the work folder."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np

from llama_fn import progress
from llama_fn.config import Config
from llama_fn.data import corpus, identity, indexed, tokenizer, writer
from llama_fn.data.mixture import Source, sources
from llama_fn.data.vocabularies import Tokenizer
from llama_fn.errors import UserError

log = logging.getLogger("llama_fn.data")
BATCH_DOCUMENTS, BATCH_CHARS = 256, 1 << 22  # encoded in one call, which nothing interrupts
TRAINING = 0.5  # of the time that tokenizing takes, where a tokenizer is trained


def check(cfg: Config) -> None:
    """UserError for data or a tokenizer that cannot be used, as far as that is known before anything is written."""
    for source in sources(cfg.data.path):
        prefix = given_prefix(source.path)
        if prefix is not None:
            indexed.IndexedDataset(prefix)
            continue
        corpus.refuse_empty(source.path, cfg.data.jsonl_key)
        if cfg.data.tokenizer:
            _tokenizer(cfg, Path(cfg.data.tokenizer))


def tokenizer_of(cfg: Config, workdir: Path) -> Tokenizer | None:
    """That of the data, once they are there; None where they are tokens and no tokenizer is named."""
    texts = _texts(cfg)
    return _tokenizer(cfg, _tokenizer_path(cfg, workdir / "data", texts)) if texts or cfg.data.tokenizer else None


def prefixes(cfg: Config, workdir: Path) -> list[Path]:
    """That of each source, tokenized if it is text. UserError where they are of several tokenizers."""
    listed, texts = sources(cfg.data.path), _texts(cfg)
    model_path = _made_tokenizer(cfg, workdir / "data", texts) if texts else None
    with progress.span(TRAINING, 1.0):
        made = [
            given_prefix(source.path) or _tokenized(cfg, source, workdir, model_path)
            for source in progress.tracked(listed)
        ]
    identity.refuse_others(made, model_path or (Path(cfg.data.tokenizer) if cfg.data.tokenizer else None))
    return made


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


def _texts(cfg: Config) -> list[str]:
    """What identifies each source that is text."""
    return [_text(cfg, source) for source in sources(cfg.data.path) if given_prefix(source.path) is None]


def _text(cfg: Config, source: Source) -> str:
    return f"{corpus.identity(source.path)}\0{cfg.data.jsonl_key}\0{corpus.SEED}"


def _tokenizer_path(cfg: Config, folder: Path, texts: list[str]) -> Path:
    """Of the tokenizer that is given, or trained on `texts`."""
    if cfg.data.tokenizer:
        return Path(cfg.data.tokenizer)
    return folder / f"tokenizer_{_name(f'{chr(1).join(texts)}{cfg.model.vocab_size}'.encode())}.model"


def _made_tokenizer(cfg: Config, folder: Path, texts: list[str]) -> Path:
    """The tokenizer of sources that are text, trained on all of them unless one is given."""
    path = _tokenizer_path(cfg, folder, texts)
    if not cfg.data.tokenizer and not path.exists():
        listed = [source for source in sources(cfg.data.path) if given_prefix(source.path) is None]
        log.info("tokenizer: training %d pieces on %s", cfg.model.vocab_size, ", ".join(map(_corpus_name, listed)))
        folder.mkdir(parents=True, exist_ok=True)
        each = [corpus.documents(source.path, cfg.data.jsonl_key) for source in listed]
        with progress.span(0.0, TRAINING, "training a tokenizer"):
            tokenizer.train(_in_turn(each), cfg.model.vocab_size, path)
    return path


def _in_turn(each: list[Iterator[str]]) -> Iterator[str]:
    """A document of each until all are at their end."""
    for documents in zip_longest(*each):
        yield from (text for text in documents if text is not None)


def _tokenized(cfg: Config, source: Source, workdir: Path, model_path: Path | None) -> Path:
    """The prefix of a source that is text, tokenized into the work folder.

    What is made is named after what it is made of, so that another corpus, or one that has changed, is another file.
    """
    assert model_path is not None, "there is one wherever a source is text"
    pieces = _tokenizer(cfg, model_path)
    named = f"{source.name or 'llama'}_{_name(_text(cfg, source).encode() + model_path.read_bytes())}"
    prefix = workdir / "data" / f"{named}_text_document"
    if not indexed.exists(prefix):
        identity.note(prefix, model_path)
        with progress.span(0.0, 1.0, f"tokenizing {_corpus_name(source)}"):
            _tokenize(cfg, source, pieces, prefix)
    return prefix


def _name(of: bytes) -> str:
    return hashlib.sha256(of).hexdigest()[:12]


def _tokenizer(cfg: Config, path: Path) -> Tokenizer:
    pieces = tokenizer.load(path)
    tokenizer.check_vocabulary(pieces, cfg.model.vocab_size, path)
    if pieces.eos_id() < 0:
        raise UserError(f"--data.tokenizer={path} has no end-of-sequence token; documents need one")
    return pieces


def _corpus_name(source: Source) -> str:
    return source.path or "Python's standard library"


def _tokenize(cfg: Config, source: Source, pieces: Tokenizer, prefix: Path) -> None:
    start, total = time.monotonic(), corpus.size(source.path)
    log.info("tokenizing %s into %s", _corpus_name(source), prefix)
    count, tokens = writer.write_on(
        prefix,
        lambda done: _sequences(_said(corpus.documents(source.path, cfg.data.jsonl_key), total), pieces, done),
        indexed.best_dtype(cfg.model.vocab_size),
        lambda done: log.info("tokenizing: %d documents were done before; going on", done),
    )
    if count < 3:
        log.warning("the corpus has only %d documents; --data.split may leave parts of it empty", count)
    log.info("tokenized %d documents, %d tokens in %.1f s", count, tokens, time.monotonic() - start)


def _said(texts: Iterator[str], total: int) -> Iterator[str]:
    """The same, counted: characters, of about as many bytes in all."""
    count = 0
    for text in texts:
        progress.say(count / max(total, 1))
        yield text
        count += len(text)


def _sequences(texts: Iterator[str], pieces: Tokenizer, done: int) -> Iterator[np.ndarray]:
    """Token ids of each of `texts` but the first `done`, closed by the end-of-sequence token."""
    pending: list[str] = []
    count, waiting, said = 0, 0, time.monotonic()

    def encode() -> Iterator[np.ndarray]:
        for ids in tokenizer.encode_all(pieces, pending):
            yield np.array([*ids, pieces.eos_id()], dtype=np.int64)

    for text in islice(texts, done, None):
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
