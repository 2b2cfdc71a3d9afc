"""Reading what a run logged: the records of metrics.jsonl, one for each iteration that was logged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_fn.errors import UserError

Record = dict[str, Any]
RANKS = "ranks.jsonl"  # in the work folder: run/ranks.py, which needs torch, as readers do not


def read(path: Path) -> list[Record]:
    """The records of a work folder, or of a metrics.jsonl, whose numbers that were not finite are nan. UserError naming
    the file and line of what is no record."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: name a run's work folder or its metrics.jsonl")
    records = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(text)
            odd = dict.fromkeys(row.get("nonfinite") or (), math.nan)
            records.append({**row, "iteration": int(row["iteration"]), **odd})
            loss = row["lm_loss"]
            records[-1]["lm_loss"] = math.nan if loss is None else float(loss)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is not a record with iteration and lm_loss: {error!r}") from None
    return records


def smoothed(losses: Mapping[int, float], weight: float) -> dict[int, float]:
    """An exponential mean of the losses so far, without the bias towards zero at its beginning (Adam's correction);
    those that are not finite are left out."""
    mean, known, result = 0.0, 0.0, {}
    for iteration, loss in sorted(losses.items()):
        if math.isfinite(loss):
            mean, known = weight * mean + (1 - weight) * loss, weight * known + (1 - weight)
            result[iteration] = mean / known
    return result
