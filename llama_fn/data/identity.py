"""Which tokenizer made a .bin: its hash lies beside it, so that tokens of another one are an error and not garbage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from llama_fn.errors import UserError
from llama_fn.files import atomic

SUFFIX = ".tokenizer.json"


def note(prefix: Path, tokenizer: Path) -> None:
    """Write it for `prefix`."""
    with atomic(_path(prefix)) as f:
        json.dump({"name": tokenizer.name, "sha256": sha256(tokenizer)}, f)


def hand_on(prefixes: Iterable[Path], to: Path) -> None:
    """Write the note of `prefixes` for what is made of them, if one has any."""
    found = next((found for prefix in prefixes if (found := _read(prefix)) is not None), None)
    if found is not None:
        with atomic(_path(to)) as f:
            json.dump({"name": found[0], "sha256": found[1]}, f)


def refuse_others(prefixes: Iterable[Path], tokenizer: Path | None) -> None:
    """UserError where a prefix is known to be of another tokenizer than `tokenizer`, or than another prefix. One
    without a note may be of any."""
    known = [(prefix, found) for prefix in prefixes if (found := _read(prefix)) is not None]
    wanted = [("--data.tokenizer", str(tokenizer), sha256(tokenizer))] if tokenizer is not None else []
    wanted += [(str(prefix), name, digest) for prefix, (name, digest) in known]
    for prefix, (name, digest) in known:
        if digest != wanted[0][2]:
            raise UserError(
                f"{prefix}.bin was made with the tokenizer {name} (SHA-256 {digest[:12]}), and {wanted[0][0]} is of "
                f"{wanted[0][1]} ({wanted[0][2][:12]}): their tokens mean different text. Tokenize it again, or name "
                "the tokenizer that it was made with"
            )


def _path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + SUFFIX)


def sha256(path: Path) -> str:
    """Of a tokenizer's file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(prefix: Path) -> tuple[str, str] | None:
    path = _path(prefix)
    try:
        found = json.loads(path.read_bytes())
        return str(found["name"]), str(found["sha256"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged, and says which tokenizer made {prefix.name}.bin. Bring it back, or delete it to use "
            "the data unchecked"
        ) from None
