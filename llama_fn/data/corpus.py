"""Documents of a corpus as text: a text file, a folder of them, a JSON file, or Python's own library.

A folder's files are taken in an order drawn with SEED, always the same for the same names, so that the documents at the
end, which validation takes, are not those of the last names. Passed over are hidden files and folders, empty files, and
the work folders of runs, which hold what was trained on, not what to train on.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llama_fn.data import json_text, tables
from llama_fn.data.streams import Reading, kind
from llama_fn.errors import UserError

log = logging.getLogger("llama_fn.data")
SEED = 1234  # of the order of files; not --run.seed, with which every seed would tokenize anew
DOCUMENT_CHARS = 1 << 20  # a longer text file becomes several documents, cut at line ends
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".html", ".tex", ".json", ".csv", ""}
RUN_FILE = "run.lock"  # what tells a work folder
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def documents(path: str, reading: Reading | str) -> Iterator[str]:
    """The documents under `path` in a fixed order; an empty path is the standard library's sources. `reading`: how, or
    the key of texts in JSON and tables.

    UserError names the file (and line) that is missing, not UTF-8 text, or not the JSON that was expected.
    """
    if not path:
        yield from _standard_library()
        return
    root, any_text = _existing(path), False
    listed = shuffled(files(root))
    for text in of_files(listed, Reading(reading) if isinstance(reading, str) else reading, root.is_file()):
        any_text = True
        yield text
    if not any_text:
        raise UserError(f"--data.path={path} holds no text: expected at least one non-empty document")


def refuse_empty(path: str, reading: Reading | str) -> None:
    """UserError where there is no document, or the first cannot be read."""
    if path:
        next(documents(path, reading))
    elif next(Path(sysconfig.get_path("stdlib")).rglob("*.py"), None) is None:  # not all of its files: they are many
        raise UserError(
            "without --data.path the sources of Python's standard library are trained on, and this Python has none in "
            f"{sysconfig.get_path('stdlib')}: name a file or folder of text with --data.path"
        )


def shuffled(listed: Sequence[Path]) -> list[Path]:
    """Files in an order that SEED and their number alone decide."""
    order = list(listed)
    random.Random(SEED).shuffle(order)
    return order


def of_files(listed: Iterable[Path], reading: Reading, named: bool) -> Iterator[str]:
    """The documents of files, one file after the other; empty ones are passed over. `named`: each was named itself, and
    was not found in a folder."""
    for file in listed:
        try:
            yield from (text for text in _texts(file, reading, named) if text.strip())
        except OSError as error:
            raise UserError(f"--data.path: {file} cannot be read: {error.strerror or error}") from None


def identity(path: str) -> str:
    """Another one whenever a file of the corpus is another one: names, sizes and times of change."""
    digest = hashlib.sha256()
    if not path:
        digest.update(f"{platform.python_version()} {sysconfig.get_path('stdlib')}".encode())
        return digest.hexdigest()
    root = _existing(path)
    for file in files(root):
        stat = file.stat()
        digest.update(
            f"{file.relative_to(root.parent)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _existing(path: str) -> Path:
    root = Path(path)
    if not root.exists():
        raise UserError(f"--data.path={path}: no such file or folder. Give a text file, .jsonl file, folder, or prefix")
    if not root.is_dir() and not root.is_file():
        raise UserError(f"--data.path={path} is neither a file nor a folder")
    return root


def _texts(file: Path, reading: Reading, alone: bool) -> Iterator[str]:
    """A file's documents. `alone`: it is what the user named, not one of a folder, where JSON may also be just text."""
    suffix = kind(file)
    if suffix in json_text.LINES:
        return json_text.from_lines(file, reading)
    if suffix in tables.TABLES and (suffix != ".csv" or tables.has_column(file, reading)):
        return tables.from_table(file, reading)
    documents = json_text.from_json(file, reading, required=alone) if suffix == ".json" else None
    return _pieces(_text(file, alone, reading)) if documents is None else documents


def size(path: str) -> int:
    """Bytes of the files of a corpus."""
    return sum(file.stat().st_size for file in (files(_existing(path)) if path else _library_files()))


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    return [f for f in sorted(root.rglob("*.py")) if skipped.isdisjoint(f.relative_to(root).parts)]


def _standard_library() -> Iterator[str]:
    for file in shuffled(_library_files()):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield from _pieces(text)


def files(root: Path) -> list[Path]:
    """The files to read under a folder, or the file itself."""
    if root.is_file():
        return [root]
    wanted = TEXT_SUFFIXES | json_text.LINES | tables.TABLES
    texts, empty, runs = [], 0, set()
    for file in sorted(root.rglob("*")):
        below = file.relative_to(root)
        if any(part.startswith(".") for part in below.parts) or kind(file) not in wanted or not file.is_file():
            continue
        run = next((p for p in below.parents if (root / p / RUN_FILE).is_file()), None)
        if run is not None:
            runs.add(run)
        elif not file.stat().st_size:
            empty += 1
        else:
            texts.append(file)
    if runs:
        log.info("--data.path=%s: left out, as folders of runs: %s", root, ", ".join(sorted(map(str, runs))))
    if not texts:
        raise UserError(
            f"--data.path={root}: the folder holds no text files ({', '.join(sorted(wanted - {''}))})"
            + (f"; {empty} empty ones were passed over" if empty else "")
        )
    return texts


def _text(file: Path, alone: bool, reading: Reading) -> str:
    with reading.opened(file) as stream:
        raw = stream.read().removeprefix(json_text.BOM)
    if not raw.strip():
        if not alone:
            return ""
        raise UserError(f"--data.path: {file} is empty; expected UTF-8 text")
    if raw.startswith(_UTF16):
        raise UserError(f"--data.path: {file} is UTF-16 text; convert it (iconv -f UTF-16 -t UTF-8)")
    if b"\0" in raw[: 1 << 16]:
        raise UserError(
            f"--data.path: {file} is a binary file (a NUL byte stands at {raw.index(0)}); expected UTF-8 text, .jsonl, "
            "or the PREFIX of PREFIX.bin and PREFIX.idx"
        )
    try:
        return reading.text(raw) or ""
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data.path: {file} is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x}; convert it "
            "(iconv -t UTF-8) or name another file"
        ) from None


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = start + DOCUMENT_CHARS
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
