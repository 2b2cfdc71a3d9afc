"""Documents of JSON files: one object per line, an array of objects, or a single object; their text under one key."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_fn.errors import UserError

log = logging.getLogger("llama_fn.data")
LINES = {".jsonl", ".ndjson"}
WHOLE_BYTES = 1 << 30  # of an array, which is read at once
BOM = b"\xef\xbb\xbf"
_HALF = re.compile("[\ud800-\udfff]")


def from_lines(file: Path, key: str) -> Iterator[str]:
    """The text of every line; UserError naming the line that is not UTF-8, not JSON, or has no text under `key`."""
    halves = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            text = _text_of(_parsed(line, f"{file}:{number}"), key, f"{file}:{number}")
            text, n = _HALF.subn("�", text)
            if n and not halves:
                log.warning(
                    "%s:%d holds half of a character (a lone surrogate such as \\ud83d): such halves become U+FFFD",
                    file, number,
                )  # fmt: skip
            halves += n
            yield text
    if halves:
        log.warning("%s: %d halves of characters became U+FFFD", file, halves)


def from_json(file: Path, key: str, required: bool) -> Iterator[str] | None:
    """The documents of a .json file: of its lines, its array, or itself. None, or UserError where the file is
    `required` to hold some, for JSON that has no text under `key`, and for what is not JSON."""
    shape = _shape(file, key)
    if shape == "lines":
        return from_lines(file, key)
    if shape == "other" and not required:
        return None
    if file.stat().st_size > WHOLE_BYTES:
        raise UserError(
            f"{file} is one JSON value of more than 1 GiB, which is read at once; turn it into one object per line: "
            f"jq -c '.[]' {file.name} > {file.stem}.jsonl"
        )
    value = _parsed(file.read_bytes().removeprefix(BOM), str(file))
    parts = value if isinstance(value, list) else [value]
    named = [(part, f"{file}, element {i}" if value is parts else str(file)) for i, part in enumerate(parts)]
    if not required and not all(isinstance(part, dict) and isinstance(part.get(key), str) for part in parts):
        return None
    return iter([_HALF.sub("�", _text_of(part, key, where)) for part, where in named])


def _shape(file: Path, key: str) -> str:
    """lines, array, object, or other, judged by the first line; lines too must have a text in the first one."""
    with open(file, "rb") as f:
        first = next((line for line in f if line.removeprefix(BOM).strip()), b"").removeprefix(BOM).strip()
        more = any(line.strip() for line in f)
    if first[:1] == b"[":
        return "array"
    if first[:1] != b"{":
        return "other"
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return "object"  # that goes on in the next line
    return "lines" if more and isinstance(value.get(key), str) else "object"


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte {error.start} of it is 0x{text[error.start]:02x}; convert the file "
            "(iconv -t UTF-8)"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); expected one object per line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise UserError(f"{where} cannot be read as JSON ({str(error)[:80]})") from None


def _text_of(value: Any, key: str, where: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        has = sorted(map(str, value))[:12] if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where} has no text under --data.jsonl_key={key}; found {has}")
    text: str = value[key]
    return text
