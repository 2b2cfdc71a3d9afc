"""Load a tokenizer of any family, or train one like LLaMA's on a corpus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import sentencepiece as spm

from llama_fn import progress
from llama_fn.data.integrity import BlockSums, check_file, read_sums, write_sums
from llama_fn.data.vocabularies import HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer, tiktoken_ranks
from llama_fn.errors import UserError
from llama_fn.files import atomic

TRAINING_CHARS = 8_000_000
LINE_CHARS = 1 << 14  # at most four bytes each: the 65,536 bytes that sentencepiece takes for a line
READING = 0.2  # of the time that training takes
PADDING = 1024  # rows that a model may have beyond its tokenizer's pieces


def load(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a sentencepiece model, Hugging Face's tokenizer.json, or Llama 3's tiktoken file, told
    apart by what they hold. UserError if it is missing, none of these, or not as `train` wrote it."""
    if not path.is_file():
        raise UserError(
            f"--data.tokenizer={path}: no such file; expected sentencepiece's tokenizer.model, tokenizer.json, or the "
            "tokenizer.model of Llama 3"
        )
    if listed := read_sums(path).get(path.name):
        check_file(path, listed)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data.tokenizer={path} cannot be read: {error.strerror}") from None
    if data.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(path)
    if (ranks := tiktoken_ranks(data)) is not None:
        return TiktokenTokenizer(path, ranks)
    return load_model(path, data)


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, on all cores."""
    if isinstance(tokenizer, spm.SentencePieceProcessor):
        return list(tokenizer.encode(list(texts), num_threads=0))
    return list(tokenizer.encode(list(texts)))


def load_model(path: Path, data: bytes) -> spm.SentencePieceProcessor:
    """A sentencepiece model, which `data` has to be; UserError where it is none."""
    try:
        loaded = spm.SentencePieceProcessor(model_proto=data)
        if not data or not loaded.vocab_size():
            raise RuntimeError("it has no pieces")
        return loaded
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter where its message quotes the damage
        raise UserError(
            f"--data.tokenizer={path} is not a sentencepiece model ({str(error)[:80]}), and neither a tokenizer.json "
            "nor a tiktoken file"
        ) from None


def train(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Write a BPE model like LLaMA's (byte fallback, digits split, text kept as it is) of `vocab_size` pieces.

    Trained on the first TRAINING_CHARS characters of lines; the same texts give the same bytes.
    """
    with progress.span(0.0, READING, "reading"):
        lines = list(_lines(texts))
    # One thread, so that the same texts give the same bytes. The log tells how far it is.
    options = {
        "vocab_size": vocab_size, "model_type": "bpe", "byte_fallback": True, "split_digits": True, "unk_id": 0,
        "bos_id": 1, "eos_id": 2, "pad_id": -1, "num_threads": 1, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
        "max_sentence_length": 4 * LINE_CHARS, "minloglevel": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, progress.span(READING, 1.0, "merging"):
        made = Path(folder) / "model"
        status, said = _in_child(made, {"lines": lines, "options": options}, vocab_size)
        if status:
            raise UserError(
                f"no tokenizer of --model.vocab_size={vocab_size} pieces can be trained on this corpus: {_why(said)}. "
                "Give more text, another vocabulary, or a --data.tokenizer"
            )
        model = made.read_bytes()
    sums = BlockSums()
    sums.add(model)
    write_sums(path, {path.name: sums})
    with atomic(path, "wb") as f:
        f.write(model)


def _in_child(model: Path, asked: Mapping[str, Any], pieces: int) -> tuple[int, str]:
    """The status of a child that trains, and the last line of its log."""
    last = ""
    command = [sys.executable, str(Path(__file__).with_name("tokenizer_child.py")), str(model)]
    # The log quotes pieces in UTF-8, whatever the locale.
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, encoding="utf-8", errors="replace") as child:
        assert child.stdin is not None and child.stderr is not None
        try:
            with suppress(BrokenPipeError), child.stdin:  # one that died has said why, or nothing
                json.dump(asked, child.stdin)
            for line in child.stderr:
                last = line.strip() or last
                if merges := re.search(r"\bmerges=(\d+)", line):
                    progress.say(int(merges[1]) / pieces)
        except BaseException:
            child.kill()
            raise
    return child.returncode, last if child.returncode > 0 else f"its process was ended by signal {-child.returncode}"


def _why(said: str) -> str:
    """What sentencepiece says of a number of pieces that it cannot train."""
    if most := re.search(r"value <= (\d+)", said):
        return f"it has at most {most[1]}"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", said):
        return f"its characters and the 256 bytes alone take {least[1]}"
    return said.rpartition("] ")[2].strip().rstrip(".")


def _lines(texts: Iterable[str]) -> Iterable[str]:
    """Lines for training, several joined so that line breaks and indentation are learned, until enough characters.
    What is too long for the trainer, which would pass it over, is cut."""
    budget = TRAINING_CHARS
    for text in texts:
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), 8):
            joined = "".join(lines[start : start + 8])
            for at in range(0, len(joined), LINE_CHARS):
                block = joined[at : at + LINE_CHARS]
                budget -= len(block)
                if budget < 0:
                    return
                if block.strip():
                    yield block
        progress.say(1 - budget / TRAINING_CHARS)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    """UserError unless the model's rows fit the tokenizer, padding of up to PADDING rows allowed."""
    pieces = tokenizer.vocab_size()
    if not pieces <= vocab_size < pieces + PADDING:
        raise UserError(
            f"tokenizer {path} has {pieces} pieces, the model --model.vocab_size={vocab_size} rows; "
            f"use --model.vocab_size={pieces} or the tokenizer of this model"
        )
