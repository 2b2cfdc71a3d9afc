"""One run at a time in a work folder: two would delete one another's checkpoints.

The file FILE is locked by the system for as long as the process lives, which also holds on shared disks whose servers
pass locks on. Where they do not, or for a run on another machine, the file tells who it is, and is touched every BEAT_S
seconds: a file that nobody has touched for STALE_S was left by a process that died.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_fn.errors import UserError
from llama_fn.files import alive

log = logging.getLogger("llama_fn.lock")
FILE = "run.lock"
BEAT_S, STALE_S = 10.0, 45.0


class WorkdirLock:
    """Held from `acquire` to `release`, or to the end of the process."""

    def __init__(self, workdir: Path) -> None:
        self.workdir, self.path = workdir, workdir / FILE
        self.ended = threading.Event()
        self.file: int | None = None

    def acquire(self) -> WorkdirLock:
        """UserError naming the run that holds the folder."""
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locks = self._lock()
            owner = _read(self.path)
            if owner and self._lives(owner, locks):
                raise self._taken(owner)
        except BaseException:
            os.close(self.file)
            self.file = None
            raise
        self._write(json.dumps(_me()))
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def release(self) -> None:
        """Let others train here."""
        if self.file is not None:
            self.ended.set()
            self._write("")
            os.close(self.file)
            self.file = None

    def _lock(self) -> bool:
        """Whether this file system has locks; UserError where another process has this one."""
        assert self.file is not None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken(_read(self.path)) from None
        except OSError:  # no locks here
            return False
        return True

    def _lives(self, owner: dict[str, Any], locks: bool) -> bool:
        """Whether the process that the file names may still run. The lock is ours, or there are none."""
        if owner.get("boot") == _boot():
            return not locks and alive(int(owner.get("pid", 0))) and _started(int(owner["pid"])) == owner.get("started")
        log.info("%s names a run on %s; waiting up to %.0f s for a sign of it", self.path, owner.get("host"), STALE_S)
        seen, until = _touched(self.path), time.monotonic() + STALE_S
        while time.monotonic() < until:
            time.sleep(min(1.0, STALE_S / 10))
            if _touched(self.path) != seen:
                return True
        log.warning("the run on %s has given none: taking its folder over", owner.get("host"))
        return False

    def _taken(self, owner: dict[str, Any]) -> UserError:
        who = "another process"
        if owner:
            who = f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}"
        return UserError(
            f"--run.workdir={self.workdir} is in use by {who}. Two runs would delete one another's checkpoints: "
            "wait until it has ended, stop it, or name another folder"
        )

    def _write(self, text: str) -> None:
        assert self.file is not None
        with suppress(OSError):  # a full disk: the lock itself is held all the same
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, text.encode(), 0)
            os.fsync(self.file)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self.path)


def holder(workdir: Path) -> dict[str, Any] | None:
    """Who trains in a work folder now: pid, host and since when; None for nobody. Asks without waiting, so a run on
    another machine counts as alive for STALE_S after its last touch."""
    owner = _read(workdir / FILE)
    if not owner:
        return None
    if owner.get("boot") == _boot():
        lives = alive(int(owner["pid"])) and _started(int(owner["pid"])) == owner.get("started")
    else:
        lives = time.time() - _touched(workdir / FILE) / 1e9 < STALE_S
    return owner if lives else None


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and str(holder.get("pid", "")).isdigit() else {}


def _me() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid), "since": since}


def _boot() -> str:
    """What tells this machine, since it was started, from every other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process was started, in the system's ticks; process numbers are used again. "" where that is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _touched(path: Path) -> int:
    """Opened anew each time, or network file systems would answer from memory."""
    try:
        with open(path, "rb") as f:
            return os.fstat(f.fileno()).st_mtime_ns
    except OSError:
        return 0
