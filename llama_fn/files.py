"""Files that are whole or not there: written aside, flushed to disk, then renamed; and what they hold, as sums."""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.writing")


@contextmanager
def atomic(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file opened for writing that takes the name `path` only when the block ends without an error."""
    check_writable(path)
    _remove_abandoned(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def check_writable(path: Path) -> None:
    """OSError naming what keeps a file from being written, before there is anything to write."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def sync(path: Path) -> None:
    """Until what a file holds, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """What a process of this machine that was killed had begun to write. Its number may be another's by now, and the
    folder shared between machines: then it stays."""
    for old in path.parent.glob(f".{path.name}.*.writing"):
        match = _ASIDE.fullmatch(old.name)
        if match and match["name"] == path.name and not alive(int(match["pid"])):
            with suppress(OSError):
                old.unlink()


_TEMPORARY: list[str] = []


def temporary_folder(prefix: str) -> Path:
    """A new folder, which the end of this process removes; OSError where there can be none."""
    _TEMPORARY.append(tempfile.mkdtemp(prefix=prefix))
    return Path(_TEMPORARY[-1])


@atexit.register
def remove_temporary() -> None:
    """For a process that ends without Python's own way out."""
    while _TEMPORARY:
        shutil.rmtree(_TEMPORARY.pop(), ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def checksum(path: Path) -> list[int]:
    """[size, CRC-32] of a file; OSError where it cannot be read."""
    size = crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def files_below(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Path]:
    """Every file below `folder` whose own name, and whose folders' names, are `wanted`, by its path in the folder."""
    paths = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(filter(wanted, folders))
        for name in sorted(filter(wanted, names)):
            path = Path(parent, name)
            paths[path.relative_to(folder).as_posix()] = path
    return paths
