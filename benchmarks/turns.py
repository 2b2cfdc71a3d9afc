"""A contender of a benchmark in a process of its own, which works when it is its turn (contender.serve)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Contender:
    """`script` gets `spec` as JSON; `first` is what it says once it is ready, `turn(n)` what n steps took."""

    def __init__(self, name: str, script: Path, spec: Mapping[str, Any], folder: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}, cwd=folder,
        )  # fmt: skip
        self.first = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"{self.name} ended with status {self.process.wait()} before answering")

    def turn(self, steps: int = 1) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
