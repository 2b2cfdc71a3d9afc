"""What ran: versions of what a run's numbers depend on, the commit of this code, and the command."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "torch_npu", "numpy", "optree", "orbax-checkpoint", "sentencepiece")
_REPOSITORY = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str]:
    """By name; packages that are not installed, and a commit where the code is no clone of the repository, are left
    out."""
    found = {"llama_fn": importlib.metadata.version("llama_fn"), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return {**found, **({"commit": commit} if commit else {}), "machine": platform.platform()}


def command() -> str:
    """As it was typed."""
    return " ".join(sys.argv)


@functools.cache
def _commit() -> str:
    if not (_REPOSITORY / ".git").exists():
        return ""
    try:
        words = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a slow disk: the run matters more
        return ""
