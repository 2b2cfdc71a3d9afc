"""What --data.path names: one corpus, or a mixture of several with a weight for each.

A mixture is a YAML file, or Megatron's list of weights and prefixes in one string:

    sources:
      - {name: ccnet, path: work/corpus/ccnet, weight: 67}
      - {name: wikipedia, path: work/corpus/wikipedia, weight: 4.5, epochs: 3}    # at most so often
      - {name: books, path: work/tokens/books_text_document, weight: 4.5, valid: false}

    --data.path="0.67 work/tokens/ccnet_text_document 0.33 work/tokens/c4_text_document"

Paths are text or prefixes of .bin/.idx, as --data.path alone takes them, seen from where the run is started.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama_fn.errors import UserError, nearest

_KEYS = {"name", "path", "weight", "epochs", "valid"}


@dataclass(frozen=True)
class Source:
    """One corpus. `weight`: of its samples among all; `epochs`: how often it may be read at most, 0 for any number;
    `valid`: whether a part of it is held out for validation. A corpus alone has no name."""

    name: str
    path: str
    weight: float = 1.0
    epochs: float = 0.0
    valid: bool = True


def sources(path: str) -> list[Source]:
    """UserError naming the file, the source and the key that are wrong."""
    if path.endswith((".yaml", ".yml")):
        return _checked(_from_yaml(Path(path)), path)
    words = path.split()
    if len(words) > 1 and len(words) % 2 == 0 and all(map(_number, words[::2])) and not os.path.exists(path):
        pairs = zip(words[1::2], words[::2], strict=True)
        return _checked([Source(Path(p).name, os.path.expanduser(p), float(w)) for p, w in pairs], path)
    return [Source("", path)]


def _from_yaml(path: Path) -> list[Source]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"--data.path={path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--data.path={path} is not YAML: {str(error).splitlines()[0]}") from None
    listed = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: expected `sources:` with a list of sources, found {type(content).__name__}")
    if extra := sorted(map(str, set(content) - {"sources"})):
        raise UserError(f"{path}: {extra[0]} is no key of a mixture; it has sources")
    return [_source(entry, f"{path}, source {i}") for i, entry in enumerate(listed, 1)]


def _source(entry: Any, where: str) -> Source:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected name, path and weight, found {str(entry)[:80]!r}")
    if extra := sorted(map(str, set(entry) - _KEYS)):
        raise UserError(f"{where}: {extra[0]} is no key of a source. {nearest(extra[0], sorted(_KEYS))}")
    if missing := sorted({"name", "path", "weight"} - set(entry)):
        raise UserError(f"{where}: {missing[0]} is missing")
    kinds = {"name": (str,), "path": (str,), "weight": (int, float), "epochs": (int, float), "valid": (bool,)}
    for key, value in entry.items():
        if not isinstance(value, kinds[key]) or (isinstance(value, bool) and key != "valid"):
            raise UserError(f"{where}: {key} is {value!r}; expected {' or '.join(k.__name__ for k in kinds[key])}")
    return Source(**{**entry, "path": os.path.expanduser(entry["path"])})


def _checked(found: list[Source], path: str) -> list[Source]:
    names = [source.name for source in found]
    for source in found:
        if not 0 < source.weight < math.inf:
            raise UserError(
                f"{path}: source {source.name} has the weight {source.weight:g}; weights are above 0. Leave out a "
                "source that is not to be used"
            )
        if not 0 <= source.epochs < math.inf:
            raise UserError(f"{path}: source {source.name} has epochs {source.epochs:g}; 0 means any number")
        if names.count(source.name) > 1:
            raise UserError(f"{path}: two sources are called {source.name!r}. Give each a name of its own")
        if not source.name or any(not c.isalnum() and c not in "_-." for c in source.name):
            raise UserError(f"{path}: a source is called {source.name!r}; letters, digits, _, - and . make a name")
        if not source.path:
            raise UserError(f"{path}: source {source.name} has no path")
    return found


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
