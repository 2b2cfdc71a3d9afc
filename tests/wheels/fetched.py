"""Wheels that tests need and the project's own environment must not hold, unpacked in folders of their own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class Unavailable(RuntimeError):
    """Why something cannot be had here."""


def cache(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / name


def folder(within: str, package: str, version: str) -> Path:
    """Where a wheel of this Python and machine belongs in a folder of the user's cache."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return cache(within) / f"{package}-{version}-{platform.machine()}-{tag}"


def finished(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, filled by `make(folder)` where it is not there yet, and named so at once: what is there is complete."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name))
    try:
        make(made)
        made.rename(target)
    except OSError:
        if not target.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def wheel(package: str, version: str, target: Path) -> None:
    """Unpack a wheel without what it depends on; Unavailable where there is none."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{package} {version} cannot be fetched for this platform:\n{done.stderr[-2000:]}")
