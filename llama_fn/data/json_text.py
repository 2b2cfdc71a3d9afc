"""Documents of JSON files: one object per line, an array of objects, or a single object; their text under one key."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_fn.data.streams import Reading
from llama_fn.errors import UserError

log = logging.getLogger("llama_fn.data")
LINES = {".jsonl", ".ndjson"}
WHOLE_BYTES = 1 << 30  # of an array, which is read at once
BOM = b"\xef\xbb\xbf"
LEFT_OUT = object()  # a document that is not UTF-8, where those are skipped
_HALF = re.compile("[\ud800-\udfff]")


def from_lines(file: Path, reading: Reading) -> Iterator[str]:
    """The text of every line; UserError naming the line that is not UTF-8, not JSON, or has no text under the key."""
    halves = 0
    with reading.opened(file) as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            value = _parsed(line, f"{file}:{number}", reading)
            if value is LEFT_OUT:
                continue
            text = _text_of(value, reading.key, f"{file}:{number}")
            # Only an escape can spell half of a character, and looking for one is much faster.
            text, n = _HALF.subn("�", text) if b"\\ud" in line or b"\\uD" in line else (text, 0)
            if n and not halves:
                log.warning(
                    "%s:%d holds half of a character (a lone surrogate such as \\ud83d): such halves become U+FFFD",
                    file, number,
                )  # fmt: skip
            halves += n
            yield text
    if halves:
        log.warning("%s: %d halves of characters became U+FFFD", file, halves)


def from_json(file: Path, reading: Reading, required: bool) -> Iterator[str] | None:
    """The documents of a .json file: of its lines, its array, or itself. None, or UserError where the file is
    `required` to hold some, for JSON that has no text under the key, and for what is not JSON."""
    shape, key = _shape(file, reading), reading.key
    if shape == "lines":
        return from_lines(file, reading)
    if shape == "other" and not required:
        return None
    if file.stat().st_size > WHOLE_BYTES:
        raise UserError(
            f"{file} is one JSON value of more than 1 GiB, which is read at once; turn it into one object per line: "
            f"jq -c '.[]' {file.name} > {file.stem}.jsonl"
        )
    with reading.opened(file) as stream:
        value = _parsed(stream.read().removeprefix(BOM), str(file), reading)
    if value is LEFT_OUT:
        return iter([])
    parts = value if isinstance(value, list) else [value]
    named = [(part, f"{file}, element {i}" if value is parts else str(file)) for i, part in enumerate(parts)]
    if not required and not all(isinstance(_under(part, key), str) for part in parts):
        return None
    return iter([_HALF.sub("�", _text_of(part, key, where)) for part, where in named])


def _shape(file: Path, reading: Reading) -> str:
    """lines, array, object, or other, judged by the first line; lines too must have a text in the first one."""
    with reading.opened(file) as f:
        first = next((line for line in f if line.removeprefix(BOM).strip()), b"").removeprefix(BOM).strip()
        more = any(line.strip() for line in f)
    reading.finished_bytes -= file.stat().st_size  # it will be read again
    if first[:1] == b"[":
        return "array"
    if first[:1] != b"{":
        return "other"
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return "object"  # that goes on in the next line
    return "lines" if more and isinstance(_under(value, reading.key), str) else "object"


def _parsed(raw: bytes, where: str, reading: Reading) -> Any:
    try:
        text = reading.text(raw)
        return LEFT_OUT if text is None else json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: byte {error.start} of it is 0x{raw[error.start]:02x}; convert the file "
            "(iconv -t UTF-8)"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); expected one object per line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise UserError(f"{where} cannot be read as JSON ({str(error)[:80]})") from None


def _text_of(value: Any, key: str, where: str) -> str:
    text = _under(value, key)
    if not isinstance(text, str):
        has = sorted(map(str, value))[:12] if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where} has no text under --data.jsonl_key={key}; found {has}")
    return text


def _under(value: Any, key: str) -> Any:
    """What stands under a key, or under "a.b" within a."""
    if isinstance(value, dict) and key not in value and "." in key:
        first, rest = key.split(".", 1)
        return _under(value.get(first), rest)
    return value.get(key) if isinstance(value, dict) else None
