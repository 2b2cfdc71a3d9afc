"""The part of preprocess that shares a corpus out over tasks: datatrove's executors, on one machine or under SLURM.

Each task reads a run of the files, and writes token files of its own; when all are done, one more joins them in the
order of the files, so that the bytes are those of a run without tasks. datatrove knows which tasks are done, and does
the rest when the command is given again. It hands its pipeline to SLURM's tasks as a pickle in OUT.tasks, a folder that
nobody else may write to. Needs the extra `cluster`.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from llama_fn.data import corpus, encoding, indexed, tokenizer, writer
from llama_fn.data.streams import Reading
from llama_fn.errors import UserError
from llama_fn.tools import preprocess_tokens


@dataclass(frozen=True)
class Slurm:
    """What sbatch is told."""

    partition: str
    time: str
    more: tuple[str, ...]

    def options(self) -> dict[str, str]:
        """`more`, KEY=VALUE each, taken apart. UserError for what is not."""
        if wrong := [word for word in self.more if "=" not in word]:
            raise UserError(f"--sbatch={wrong[0]} is not KEY=VALUE, such as account=llm")
        return dict(word.split("=", 1) for word in self.more)


class Texts(PipelineStep):
    """The documents of a task's files."""

    name, type = "Texts", "Reader"

    def __init__(self, files: Sequence[Path], key: str, errors: Any) -> None:
        super().__init__()
        self.files, self.key, self.errors = files, key, errors

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """One for each text."""
        reading = Reading(self.key, self.errors)
        for number, text in enumerate(corpus.of_files(share(self.files, rank, world_size), reading, named=True)):
            self.stat_update("documents")
            yield Document(text, f"{rank}/{number}")
        self.stat_update("replaced", value=reading.replaced)
        self.stat_update("left_out", value=reading.skipped)


class TokenFiles(PipelineStep):
    """A task's documents as PREFIX.bin and .idx."""

    name, type = "TokenFiles", "Writer"

    def __init__(self, out: Path, path: Path, frame: encoding.Frame) -> None:
        super().__init__()
        self.out, self.path, self.frame = out, path, frame

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Writes; hands nothing on. A task without documents leaves a file that says so."""
        pieces = tokenizer.load(self.path)

        def sequences(done: int) -> Iterator[np.ndarray]:
            for document in islice(data, done, None):
                yield encoding.framed(pieces, self.frame, document.text)

        with self.track_time():
            kind = indexed.best_dtype(pieces.vocab_size())
            prefix = part(self.out, rank)
            documents, tokens = writer.write_on(prefix, sequences, kind)
            if not documents:
                for file in prefix.parent.glob(f"{prefix.name}.*"):
                    file.unlink()
                prefix.with_suffix(".empty").touch()
        self.stat_update("written", value=documents)
        self.stat_update("tokens", value=tokens)
        yield from ()


class Joined(PipelineStep):
    """The token files of all tasks, one after the other."""

    name, type = "Joined", "Writer"

    def __init__(self, out: Path, tasks: int) -> None:
        super().__init__()
        self.out, self.tasks = out, tasks

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Joins them, and removes them."""
        parts = [part(self.out, task) for task in range(self.tasks)]
        datasets = [indexed.IndexedDataset(prefix) for prefix in parts if not prefix.with_suffix(".empty").exists()]
        if not datasets:
            raise UserError(f"{self.out}: no document with any text")
        preprocess_tokens.write(self.out, datasets, [range(len(data)) for data in datasets])
        shutil.rmtree(folder(self.out) / "parts")
        yield from ()


def folder(out: Path) -> Path:
    """Of datatrove's logs and the token files of tasks."""
    return out.with_name(out.name + ".tasks")


def part(out: Path, rank: int) -> Path:
    """The prefix of a task's files."""
    return folder(out) / "parts" / f"{rank:05d}"


def share(files: Sequence[Path], rank: int, tasks: int) -> list[Path]:
    """The files of a task: neighbours, about as many bytes as every other's."""
    sizes = np.array([file.stat().st_size for file in files], np.float64) + 1
    middles = np.cumsum(sizes) - sizes / 2
    owners = np.minimum((middles / sizes.sum() * tasks).astype(int), tasks - 1)
    return [file for file, owner in zip(files, owners, strict=True) if owner == rank]


def run(
    files: Sequence[Path], out: Path, path: Path, frame: encoding.Frame, reading: Reading, tasks: int, workers: int,
    slurm: Slurm | None,
) -> str:  # fmt: skip
    """Do it here, or hand it to SLURM; returns what to say."""
    pipeline = [Texts(files, reading.key, reading.errors), TokenFiles(out, path, frame)]
    logs = folder(out) / "logs"
    executor: Callable[..., Any] = LocalPipelineExecutor if slurm is None else _slurm(slurm, out)
    first = executor(pipeline, tasks=tasks, workers=workers, logging_dir=str(logs / "tokens"))
    then = executor([Joined(out, tasks)], tasks=1, workers=1, logging_dir=str(logs / "join"), depends=first)
    then.run()
    if slurm is None:
        return f"{out}.bin and .idx, made by {tasks} tasks"
    return f"jobs {first.job_id} and {then.job_id} of SLURM will make {out}.bin; their logs are in {logs}"


def _slurm(slurm: Slurm, out: Path) -> Callable[..., Any]:
    def executor(pipeline: list[PipelineStep], logging_dir: str, **more: Any) -> Any:
        environment = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        name = f"{out.name}_{Path(logging_dir).name}"
        return SlurmPipelineExecutor(
            pipeline, time=slurm.time, partition=slurm.partition, job_name=name, logging_dir=logging_dir, qos="",
            env_command=environment, sbatch_args=slurm.options(), **more,
        )  # fmt: skip

    return executor
