"""Documents of a corpus as text: a text file, a folder of them, a .jsonl file, or Python's own library."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llama_fn.errors import UserError

DOCUMENT_CHARS = 1 << 20  # a longer text file becomes several documents, cut at line ends
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".html", ".tex", ".json", ".csv", ""}


def documents(path: str, jsonl_key: str) -> Iterator[str]:
    """The documents under `path` in a fixed order; an empty path is the standard library's sources.

    UserError names the file (and line) that is missing, empty, not UTF-8 text, or not the JSON that was expected.
    """
    if not path:
        yield from _standard_library()
        return
    root = Path(path)
    if not root.exists():
        raise UserError(f"--data.path={path}: no such file or folder. Give a text file, .jsonl file, folder, or prefix")
    found = False
    for file in _text_files(root) if root.is_dir() else [root]:
        for text in _jsonl(file, jsonl_key) if file.suffix == ".jsonl" else _pieces(_text(file)):
            if text.strip():
                found = True
                yield text
    if not found:
        raise UserError(f"--data.path={path} holds no text: expected at least one non-empty document")


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    for file in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(file.relative_to(root).parts):
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            yield from _pieces(text)


def _text_files(root: Path) -> list[Path]:
    files = [f for f in sorted(root.rglob("*")) if f.is_file() and f.suffix.lower() in TEXT_SUFFIXES | {".jsonl"}]
    if not files:
        raise UserError(
            f"--data.path={root}: the folder holds no text files ({', '.join(sorted(TEXT_SUFFIXES - {''}))})"
        )
    return files


def _text(file: Path) -> str:
    raw = file.read_bytes()
    if not raw.strip():
        raise UserError(f"--data.path: {file} is empty; expected UTF-8 text")
    if b"\0" in raw[: 1 << 16]:
        raise UserError(
            f"--data.path: {file} is a binary file (a NUL byte stands at {raw.index(0)}); expected UTF-8 text, .jsonl, "
            "or the PREFIX of PREFIX.bin and PREFIX.idx"
        )
    try:
        return raw.decode("utf-8")
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


def _jsonl(file: Path, key: str) -> Iterator[str]:
    with open(file, encoding="utf-8", errors="strict") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number} is not JSON ({error.msg}); expected one object per line") from None
            if not isinstance(value, dict) or not isinstance(value.get(key), str):
                has = sorted(value) if isinstance(value, dict) else type(value).__name__
                raise UserError(f"{file}:{number} has no text under --data.jsonl_key={key}; found {has}")
            yield value[key]
