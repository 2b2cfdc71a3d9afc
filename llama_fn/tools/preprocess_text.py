"""The part of preprocess that makes tokens of text."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llama_fn.data import corpus, encoding, identity, indexed, tokenizer, writer
from llama_fn.data.streams import Reading
from llama_fn.errors import UserError
from llama_fn.files import atomic

FLAGS = flags.FLAGS


def run(words: list[str]) -> int:
    """Tokenize what `words` name into --out."""
    if not FLAGS.tokenizer:
        raise UserError("give --tokenizer, a tokenizer.model or tokenizer.json")
    path, prefix = Path(os.path.expanduser(FLAGS.tokenizer)), Path(os.path.expanduser(FLAGS.out)).absolute()
    pieces = tokenizer.load(path)
    frame = encoding.Frame.of(pieces, path, FLAGS.bos, FLAGS.eos)
    listed = _files(words)
    if _already_there(prefix, _recipe(listed, path)):
        print(f"{prefix}.bin and .idx are there already, made of the same; nothing to do")
        return 0
    reading = Reading(FLAGS.jsonl_key, FLAGS.errors)
    workers = FLAGS.workers or _cores()
    if FLAGS.executor:
        print(_in_tasks(listed, prefix, path, frame, reading))
        return 0
    began = time.monotonic()
    identity.note(prefix, path)
    with _Progress(reading, sum(file.stat().st_size for file in listed)) as progress:

        def sequences(done: int) -> Iterator[np.ndarray]:
            texts = islice(corpus.of_files(listed, reading, named=True), done, None)
            yield from progress.counted(encoding.encoded(texts, path, frame, workers))

        count, tokens = writer.write_on(
            prefix, sequences, indexed.best_dtype(pieces.vocab_size()),
            lambda done: print(f"{done} documents were done before; going on", file=sys.stderr),
        )  # fmt: skip
    if not count:
        raise UserError(f"{', '.join(words)}: no document with any text")
    seconds = time.monotonic() - began
    print(
        f"{count} documents, {tokens} tokens in {prefix}.bin; {reading.bytes / 1e6:.1f} MB in {seconds:.1f} s, "
        f"{reading.bytes / 1e6 / seconds:.1f} MB/s on {workers} processes"
    )
    if reading.replaced or reading.skipped:
        print(f"not UTF-8: {reading.replaced} documents with U+FFFD, {reading.skipped} left out")
    return 0


def _in_tasks(listed: list[Path], prefix: Path, path: Path, frame: encoding.Frame, reading: Reading) -> str:
    """Through datatrove."""
    try:
        from llama_fn.tools import preprocess_cluster
    except ModuleNotFoundError as error:
        raise UserError(f"--executor needs the package {error.name}: pip install 'llama_fn[cluster,data]'") from None
    slurm = None
    if FLAGS.executor == "slurm":
        if not FLAGS.partition:
            raise UserError("--executor=slurm needs --partition")
        slurm = preprocess_cluster.Slurm(FLAGS.partition, FLAGS.time, tuple(FLAGS.sbatch))
    identity.note(prefix, path)
    workers = FLAGS.workers or (-1 if slurm else _cores())
    return preprocess_cluster.run(listed, prefix, path.absolute(), frame, reading, FLAGS.tasks, workers, slurm)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files(words: list[str]) -> list[Path]:
    """Those that are named, that lie in folders, or that fit patterns."""
    found: list[Path] = []
    for word in words:
        path = Path(os.path.expanduser(word))
        if path.is_dir():
            found += corpus.files(path)
        elif path.exists():
            found.append(path)
        elif matches := sorted(glob.glob(os.path.expanduser(word), recursive=True)):
            found += [Path(match) for match in matches if os.path.isfile(match)]
        else:
            raise UserError(f"{word}: no such file or folder, and no file fits it as a pattern")
    if twice := sorted({str(file) for file in found if found.count(file) > 1} if len(found) < 10_000 else set()):
        raise UserError(f"{twice[0]} is named twice, and would be read twice")
    return found


def _recipe(listed: list[Path], path: Path) -> dict[str, Any]:
    """What the tokens are made of, and how."""
    digest = hashlib.sha256()
    for file in listed:
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return {
        "files": digest.hexdigest(), "tokenizer": identity.sha256(path),
        "jsonl_key": FLAGS.jsonl_key, "eos": FLAGS.eos, "bos": FLAGS.bos, "errors": FLAGS.errors,
    }  # fmt: skip


def _already_there(prefix: Path, recipe: dict[str, Any]) -> bool:
    """Whether a run for the same recipe is done. One that is not is gone on with; of another recipe what was begun is
    dropped, and what is complete is an error."""
    path = prefix.with_name(prefix.name + ".recipe.json")
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        known = None
    if indexed.exists(prefix):
        if known == recipe:
            return True
        raise UserError(f"{prefix}.bin and .idx are there, made of something else: name another --out, or remove them")
    if known != recipe:
        writer.drop(prefix)
        shutil.rmtree(prefix.with_name(prefix.name + ".tasks"), ignore_errors=True)
        with atomic(path) as f:
            json.dump(recipe, f, indent=1)
    return False


class _Progress:
    """A bar with rate and time left on a terminal, a line every few seconds elsewhere."""

    def __init__(self, reading: Reading, total: int) -> None:
        from rich import progress as bars
        from rich.console import Console

        self.reading, self.total, self.documents, self.tokens = reading, total, 0, 0
        self.on, self.said = sys.stderr.isatty(), time.monotonic()
        self.bar = bars.Progress(
            bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn(),
            bars.TextColumn("{task.description}"), console=Console(stderr=True), disable=not self.on,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def counted(self, sequences: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same, counted."""
        for sequence in sequences:
            yield sequence
            self.documents += 1
            self.tokens += len(sequence)
            if (now := time.monotonic()) - self.said > (0.2 if self.on else 10):
                self.said, words = now, f"{self.documents} documents, {self.tokens / 1e6:.1f} million tokens"
                self.bar.update(self.task, completed=self.reading.bytes, description=words)
                if not self.on:
                    print(f"{self.reading.bytes / self.total:.1%}, {words}", file=sys.stderr, flush=True)
