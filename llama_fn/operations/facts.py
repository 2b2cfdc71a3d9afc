"""What is known of a run, gathered once for the summary and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_fn.config import Config
from llama_fn.config_fields import flat
from llama_fn.errors import UserError
from llama_fn.model.presets import PRESETS
from llama_fn.operations.attempts import Attempt, Goodput, goodput
from llama_fn.operations.attempts import read as read_attempts
from llama_fn.operations.state import State, judged
from llama_fn.run import records

SMOOTHED = 0.98  # of the exponential mean
_SAMPLE = re.compile(r" sample at iteration (\d+) \| (\[.*\])")


@dataclass(frozen=True)
class Facts:
    """A run's: its folder, records, attempts, and config as saved."""

    folder: Path
    rows: list[records.Record]
    attempts: list[Attempt]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """That of its work folder."""
        return self.folder.resolve().name

    @cached_property
    def state(self) -> State:
        """How it is now."""
        return judged(self.folder, self.attempts, self.rows)

    @cached_property
    def goodput(self) -> Goodput:
        """What its time went to."""
        return goodput(self.attempts)

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """What its config has that its preset has not: (value, the preset's or the default)."""
        make: Callable[[], Any] | None = PRESETS.get(str(self.config.get("model.preset")))
        default = flat(Config(model=make()) if make else Config())
        odd = ("run.workdir", "model.preset")
        return {
            name: (self.config[name], value)
            for name, value in default.items()
            if name in self.config and name not in odd and self.config[name] != value
        }

    def series(self, key: str) -> list[tuple[float, float]]:
        """(iteration, value) of the records that have it."""
        found = ((row["iteration"], row.get(key)) for row in self.rows)
        return [(float(i), float(value)) for i, value in found if isinstance(value, (int, float))]

    def smoothed(self) -> list[tuple[float, float]]:
        """The loss as an exponential mean, over less of a short run."""
        weight = min(SMOOTHED, 1 - 1 / max(1.5, len(self.rows) / 50))
        losses = {row["iteration"]: row["lm_loss"] for row in self.rows}
        return [(float(i), loss) for i, loss in records.smoothed(losses, weight).items()]

    @cached_property
    def checkpoints(self) -> list[int]:
        """Iterations whose checkpoints are there."""
        folder = self.folder / "checkpoints"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        """The rounds in which processes were compared (run/ranks.py)."""
        path = self.folder / records.RANKS
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    @cached_property
    def samples(self) -> list[tuple[int, str, str]]:
        """(iteration, prompt, text) of those written last."""
        log = self.folder / "train.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        found = [(int(m[1]), *json.loads(m[2])) for m in map(_SAMPLE.fullmatch, lines) if m]
        return [each for each in found if each[0] == found[-1][0]]

    @property
    def tokens_per_second(self) -> float:
        """Over wall clock, from the first start on; a run that begins with a checkpoint of another counts its own."""
        tokens = self.series("consumed_tokens")
        return tokens[-1][1] / self.goodput.wall if tokens and self.goodput.wall else 0.0


def gather(folder: Path) -> Facts:
    """Of a work folder; UserError where no run was."""
    attempts = read_attempts(folder)
    try:
        rows = records.read(folder)
    except UserError:
        if not attempts:
            raise
        rows = []  # it has not come so far
    path = folder / "config.json"
    return Facts(folder, rows, attempts, json.loads(path.read_bytes()) if path.exists() else {})
