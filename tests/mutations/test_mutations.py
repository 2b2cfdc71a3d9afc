"""Damaged data files: an error that names what is wrong, or the data as it was; no traceback, hang, or memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("first, count", [(0, 500), pytest.param(500, 19_500, marks=pytest.mark.slow)])
def test_random_damage_is_met(first, count, tmp_path):
    command = [sys.executable, str(ROOT / "tests/mutations/worker.py"), str(tmp_path), str(first), str(count)]
    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    out = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=3600)
    lines = out.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong[:20])
    assert lines and lines[-1] == f"done {count}", (lines[-1:], out.returncode, out.stderr[-3000:])
