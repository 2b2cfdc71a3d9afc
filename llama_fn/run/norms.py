"""norms.jsonl: the norms of every layer's parameters, gradients and updates, where --run.norms_every asks for them.

One object per record: `iteration`, and under `param`, `grad` and `update` by tree path a number, or a list of one for
each layer. What is not finite is null. TensorBoard has the norms of whole layers and of whole leaves.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernels.scope_names import layer
from llama_fn.run.board import Board

FILE = "norms.jsonl"
Norms = Mapping[str, Mapping[str, torch.Tensor]]  # of params, grads and updates, by path


class NormsLog:
    """Appends to the file at `path`, and to the board if there is one."""

    def __init__(self, path: Path, board: Board | None) -> None:
        self.board = board
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, iteration: int, norms: Norms) -> None:
        """One record."""
        numbers = {kind: {path: value.tolist() for path, value in of.items()} for kind, of in norms.items()}
        row = {"iteration": iteration} | {
            kind: {path: _finite(value) for path, value in of.items()} for kind, of in numbers.items()
        }
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        if self.board is not None:
            self.board.scalars(iteration, {
                f"norms_{kind}/{name}": value for kind, of in numbers.items() for name, value in totals(of).items()
            })  # fmt: skip

    def sync(self) -> None:
        """Until the records are on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """End the file."""
        self.file.close()


def totals(of: Mapping[str, Any]) -> dict[str, float]:
    """Norms of whole leaves by path, and of whole layers by "layers/3"."""
    leaves, layers = dict[str, float](), defaultdict[str, float](float)
    for path, value in of.items():
        each = value if isinstance(value, list) else [value]
        leaves[path] = math.hypot(*each)
        if isinstance(value, list):
            for i, one in enumerate(value):
                layers[layer(i)] = math.hypot(layers[layer(i)], one)
    return leaves | layers


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value if math.isfinite(value) else None
