"""Long orders of samples on disk, made once and mapped into memory by every process of a machine.

An order is named after all that it is made of, so one that is there is the right one, or damaged. Whoever needs one
that is not there makes it; of several that make one at the same time the first to be done is used by all. A file that
is not as it was written is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_fn.files import alive, atomic, checksum, sync

log = logging.getLogger("llama_fn.data")
LEAST = 1 << 20  # entries, below which an order is made anew in memory in no time
NAMES = ("sequences", "ends", "shuffle")
_LISTED = "sums.json"
# numpy reads a header with Python's parser, whose depth counter threads share before 3.13: two at a time can end in
# "SystemError: AST constructor recursion depth mismatch" (python/cpython issue 106905).
_READING = threading.Lock()


def kept(folder: Path, made_of: Mapping[str, Any], make: Callable[[], tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """The arrays of an order, mapped from a folder in `folder`; `make` gives them where they are not there."""
    place = folder / f"order_{hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]}"
    for _ in range(2):
        if wrong := _wrong(place):
            if place.exists():
                log.warning("%s is made again: %s", place, wrong)
                shutil.rmtree(place, ignore_errors=True)
            _write(place, make())
        try:
            with _READING:
                return [np.load(_file(place, name), mmap_mode="r") for name in NAMES]
        except (OSError, ValueError) as error:  # another process found it damaged, too, and makes it again
            log.warning("%s cannot be opened: %s", place, error)
    return list(make())


def _file(place: Path, name: str) -> Path:
    return place / f"{name}.npy"


def _wrong(place: Path) -> str:
    """What keeps an order from being used, "" for nothing. Its sums are compared once after every change of a file."""
    try:
        listed = json.loads((place / _LISTED).read_bytes())
        stamps = {name: _stamp(_file(place, name)) for name in NAMES}
        if listed["stamps"] == stamps:
            return ""
        for name in NAMES:
            if checksum(_file(place, name)) != listed["sums"][name]:
                return f"{name}.npy is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_LISTED}: {error}"
    _list(place, listed["sums"])
    return ""


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _list(place: Path, sums: Mapping[str, list[int]]) -> None:
    with atomic(place / _LISTED) as f:
        json.dump({"sums": sums, "stamps": {name: _stamp(_file(place, name)) for name in NAMES}}, f)


def _write(place: Path, arrays: tuple[np.ndarray, ...]) -> None:
    """Aside, then under its name, unless another was faster."""
    _remove_abandoned(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=f".{os.getpid()}", dir=place.parent))
    for name, array in zip(NAMES, arrays, strict=True):
        with open(_file(aside, name), "wb") as f:
            np.save(f, array)
            f.flush()
            os.fsync(f.fileno())
    _list(aside, {name: checksum(_file(aside, name)) for name in NAMES})
    try:
        os.rename(aside, place)
        sync(place.parent)
    except OSError:
        shutil.rmtree(aside)
        if not place.exists():
            raise


def _remove_abandoned(place: Path) -> None:
    """What a process of this machine that was killed had begun."""
    for old in place.parent.glob(f".{place.name}.*"):
        if (number := old.name.rsplit(".", 1)[1]).isdigit() and not alive(int(number)):
            shutil.rmtree(old, ignore_errors=True)
