"""The folder of compiled code: private, whole and writable, or set aside with a word for a folder of this process.

Loading code runs it, and unpickles: a folder that another user may write, or a file of another user, is refused.
Inductor loads what it finds, and a truncated file ends the process at every start. So the sums of all files are kept
in FILES: before anything is loaded, what does not have its sum is removed, and is compiled again. Of several processes
that compile at a time the last to leave lists the files of all. Files that nobody listed are those of a process that
was killed, or of one that is compiling now; they are removed when no process is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch

from llama_fn import compat
from llama_fn.errors import UserError
from llama_fn.files import atomic, checksum, files_below, temporary_folder

log = logging.getLogger("llama_fn.code_cache")
FILES = "files.json"
NEEDED_BYTES = 64 << 20  # what a compilation may write
_LOCK, _SEALING, _TORCH_LOCKS = ".lock", ".sealing", "locks"
_MINE: list[Path] = []  # the folder of this process, once there is one


def default() -> Path | None:
    """~/.cache/llama_fn, or None for a user without a home. XDG_CACHE_HOME counts where it is an absolute path."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "llama_fn"
    try:
        return Path.home() / ".cache" / "llama_fn"
    except RuntimeError:
        return None


def usable(folder: Path | None) -> Path:
    """`folder` where it can be written, else a folder of this process, which its end removes, with a word."""
    if folder is None:
        log.warning("compiled code is not kept: this user has no home folder; --run.compile_cache names another")
        return private()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
        reason = f"only {free / 1e6:.0f} MB are free" if free < NEEDED_BYTES else ""
    except OSError as error:
        reason = error.strerror or str(error)
    if not reason:
        _refuse_foreign(folder)
        return folder
    log.warning("compiled code is not kept in %s: %s. Every start compiles again until that is mended", folder, reason)
    return private()


def _refuse_foreign(path: Path) -> None:
    """UserError where another user owns what is there, or may write to it."""
    found = path.stat()
    others = stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    if found.st_uid == os.geteuid() and not others:
        return
    if others:
        why, remedy = "other users may write to it", f"If nobody did: chmod go-w {path}"
    else:
        why = f"it belongs to user {found.st_uid}, and this is {os.geteuid()}"
        remedy = "If you do not know why, remove it"
    raise UserError(
        f"compiled code is not loaded from {path}: {why}, and loading runs what is there. {remedy}. Or name a folder "
        "of your own with --run.compile_cache"
    )


def private() -> Path:
    """A folder that lives as long as this process."""
    if not _MINE:
        try:
            _MINE.append(temporary_folder("llama_fn_code_"))
        except OSError as error:
            raise UserError(
                f"no folder for compiled code: {error}; set TMPDIR to a folder that can be written"
            ) from None
    return _MINE[0]


def of_inductor(folder: Path | None) -> Path:
    """Where inductor keeps code for this CPU, Python, number of threads and version of what writes it: below `folder`
    or, of None, below one of this process."""
    facts = [platform.python_version(), platform.machine(), compat.cpu_model(), str(torch.get_num_threads())]
    machine = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    return compat.keep_compiled_code((usable(folder) if folder else private()) / machine)


@contextmanager
def opened(folder: Path, as_one: bool = False) -> Iterator[None]:
    """Compile or load inside; damage is removed before, `as_one`: with all else that is there, and what is new is
    listed after."""
    with _private_files():
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        with open(folder / _LOCK, "w") as lock:
            with _list_held(folder):
                if heal(folder, unlisted=_alone(lock) is True) and as_one:
                    for path in _files(folder).values():
                        path.unlink(missing_ok=True)
                    _write_list(folder, {})
            _locked(lock, fcntl.LOCK_SH)
            yield
            with _list_held(folder):
                # What another process is writing has no sum yet: the last to leave lists the files of all.
                if _alone(lock) is not False:
                    seal(folder)


@contextmanager
def _list_held(folder: Path) -> Iterator[None]:
    """No other process reads or writes the list meanwhile."""
    with open(folder / _SEALING, "w") as sealing:
        _locked(sealing, fcntl.LOCK_EX)
        yield


@contextmanager
def _private_files() -> Iterator[None]:
    """What is made inside, by compilers too, others can neither read nor write, whatever the user's umask."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _alone(lock: IO[str]) -> bool | None:
    """Whether no other process holds the lock. This one has it then, and has none any more otherwise. None where the
    file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_UN)  # the next that asks must not find this one
        return False
    except OSError:
        return None
    return True


def _locked(file: IO[str], how: int) -> None:
    """Wait for the lock; file systems without locks have none to give."""
    with suppress(OSError):
        fcntl.flock(file, how)


def heal(folder: Path, unlisted: bool) -> list[Path]:
    """Remove every file that has not its listed sum and, where asked, those that are not listed; returns the former.
    UserError for one that another user owns or may write to."""
    known = _listed(folder)
    damaged = []
    for name, path in _files(folder).items():
        with suppress(FileNotFoundError):  # another process removes what is damaged
            _refuse_foreign(path)
        if name not in known:
            if unlisted:
                path.unlink(missing_ok=True)
        elif known[name] != _sum(path):
            damaged.append(path)
            path.unlink(missing_ok=True)
    if damaged:
        # Not listed any more: what another process compiles in their place has other sums.
        _write_list(folder, {name: sums for name, sums in known.items() if folder / name not in damaged})
        log.warning(
            "compiled code was damaged: %s%s removed, to be compiled again",
            damaged[0], f" and {len(damaged) - 1} more" if damaged[1:] else "",
        )  # fmt: skip
    return damaged


def seal(folder: Path) -> None:
    """List the files that are new."""
    known, files = _listed(folder), _files(folder)
    sums = {name: known.get(name) or _sum(path) for name, path in files.items()}
    if sums != known:
        _write_list(folder, sums)


def _write_list(folder: Path, sums: dict[str, list[int]]) -> None:
    with atomic(folder / FILES) as f:
        json.dump(sums, f)


def _listed(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 by name; nothing where the list itself is missing or damaged."""
    try:
        sums = json.loads((folder / FILES).read_bytes())
    except (OSError, ValueError):
        return {}
    return sums if isinstance(sums, dict) else {}


def _files(folder: Path) -> dict[str, Path]:
    """What inductor loads; not the locks, nor what is being written."""
    return files_below(folder, lambda name: name not in (FILES, _TORCH_LOCKS) and not name.startswith("."))


def _sum(path: Path) -> list[int]:
    """Of a file that is gone or cannot be read, what no file has."""
    try:
        return checksum(path)
    except OSError:
        return [-1, 0]
