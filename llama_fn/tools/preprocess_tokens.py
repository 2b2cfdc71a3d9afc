"""The part of preprocess that looks at token files, joins them, and takes them apart."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
from absl import flags

from llama_fn.data import identity, indexed, tokenizer, writer
from llama_fn.data.integrity import verified
from llama_fn.data.samples import split_ranges
from llama_fn.data.vocabularies import Tokenizer
from llama_fn.errors import UserError

FLAGS = flags.FLAGS
PARTS = ("train", "valid", "test")
BAR = 40


def run(action: str, words: list[str]) -> int:
    """One of inspect, verify, merge and split."""
    prefixes = [Path(os.path.expanduser(word.removesuffix(".bin").removesuffix(".idx"))).absolute() for word in words]
    datasets = [indexed.IndexedDataset(prefix) for prefix in prefixes]
    pieces = tokenizer.load(Path(os.path.expanduser(FLAGS.tokenizer))) if FLAGS.tokenizer else None
    identity.refuse_others(prefixes, Path(os.path.expanduser(FLAGS.tokenizer)) if FLAGS.tokenizer else None)
    if action == "inspect":
        for data in datasets:
            print("\n".join(_described(data, pieces)))
    elif action == "verify":
        for data in datasets:
            _verify(data, FLAGS.vocab_size or (pieces.vocab_size() if pieces else 0))
    elif action == "merge":
        write(Path(os.path.expanduser(FLAGS.out)).absolute(), datasets, [range(len(data)) for data in datasets])
    else:
        if len(datasets) > 1:
            raise UserError("split takes one prefix")
        for name, (first, last) in zip(PARTS, split_ranges(FLAGS.weights, len(datasets[0])), strict=True):
            if last > first:
                write(Path(f"{os.path.expanduser(FLAGS.out)}_{name}").absolute(), datasets, [range(first, last)])
    return 0


def _described(data: indexed.IndexedDataset, pieces: Tokenizer | None) -> Iterator[str]:
    lengths = np.asarray(data.lengths, np.int64)
    yield (
        f"{data.bin_path}: {len(data)} documents, {len(data.tokens)} tokens of {data.dtype.name}, "
        f"{data.bin_path.stat().st_size / 1e6:.1f} MB"
    )
    yield f"  lengths: {lengths.min()} to {lengths.max()}, mean {lengths.mean():.1f}, median {np.median(lengths):.0f}"
    edges = [0, *(1 << n for n in range(int(lengths.max()).bit_length() + 1))]
    counts = np.histogram(lengths, edges)[0]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            yield f"  {low:>9} to {high - 1:<9} {count:>9} {'#' * max(1, round(BAR * count / counts.max()))}"
    if isinstance(pieces, spm.SentencePieceProcessor):
        yield from _pieces(data, pieces)
    if FLAGS.document >= 0:
        if FLAGS.document >= len(data):
            raise UserError(f"--document={FLAGS.document}: {data.bin_path} has documents 0 to {len(data) - 1}")
        ids = data.read(FLAGS.document, 0, int(lengths[FLAGS.document])).tolist()
        yield f"  document {FLAGS.document}, {len(ids)} tokens: {pieces.decode(ids) if pieces else ids}"


def _pieces(data: indexed.IndexedDataset, pieces: spm.SentencePieceProcessor) -> Iterator[str]:
    """How well the tokenizer knows the text: unknown pieces, and bytes in place of characters that it lacks."""
    counts = np.zeros(pieces.vocab_size(), np.int64)
    for first in range(0, len(data.tokens), 1 << 24):
        part = np.asarray(data.tokens[first : first + (1 << 24)], np.int64)
        counts += np.bincount(part[part < len(counts)], minlength=len(counts))
    for name, of in (("unknown", pieces.is_unknown), ("byte", pieces.is_byte)):
        share = sum(int(counts[i]) for i in range(len(counts)) if of(i)) / max(1, len(data.tokens))
        yield f"  {name} pieces: {share:.3%}"


def _verify(data: indexed.IndexedDataset, vocab_size: int) -> None:
    """Read all of it."""
    folder = Path(tempfile.mkdtemp(prefix="llama_fn_verify_"))
    try:
        if vocab_size:
            data.verify(vocab_size, folder / "seen.json")
        extremes = verified(data.prefix, indexed.files(data.prefix), data.tokens, folder / "seen.json")
    finally:
        shutil.rmtree(folder)
    print(f"{data.bin_path}: good; {len(data.tokens)} tokens from {extremes.smallest} to {extremes.largest}")


def write(prefix: Path, datasets: list[indexed.IndexedDataset], ranges: Iterable[range]) -> None:
    """Sequences of several datasets one after the other. UserError where there are some already."""
    if indexed.exists(prefix):
        raise UserError(f"{prefix}.bin and .idx are there: name another --out, or remove them")
    kinds: list[Any] = [data.dtype.newbyteorder("=").type for data in datasets]
    widest = max(kinds, key=lambda kind: np.dtype(kind).itemsize)

    def sequences() -> Iterator[np.ndarray]:
        for data, numbers in zip(datasets, ranges, strict=True):
            for number in numbers:
                yield data.read(number, 0, int(data.lengths[number]))

    identity.hand_on([data.prefix for data in datasets], prefix)
    count, tokens = writer.write(prefix, sequences(), widest)
    print(f"{count} documents, {tokens} tokens in {prefix}.bin")
