"""TensorBoard: losses of training and validation in one chart, everything else in groups, what was run as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_fn.config import Config
from llama_fn.config_fields import flat
from llama_fn.run.versions import command, versions

# TensorBoard sorts groups by name, so that counters come last.
GROUPS = {
    "loss": ("lm_loss",),
    "optimizer": ("learning_rate", "grad_norm", "loss_scale"),
    "speed": ("tokens_per_second", "step_time_ms", "data_wait_ms", "tflops_hardware", "mfu"),
}
TAGS = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}
LOSS = TAGS["lm_loss"]


def _add(writer: Any, scalars: Mapping[str, float], iteration: int) -> None:
    """All of an iteration as one event: one for each value takes a millisecond of every step."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if scalars:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        writer.file_writer.add_summary(Summary(value=values), iteration)


class Board:
    """Events of a run, from iteration `start` on: what an earlier process wrote of later ones is hidden. Validation is
    a run of its own below the work folder's, so that one chart shows both losses."""

    def __init__(self, cfg: Config, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.train = SummaryWriter(str(folder), purge_step=start + 1)
        self.validation = SummaryWriter(str(folder / "validation"), purge_step=start + 1)
        self._describe(cfg, start)

    def _describe(self, cfg: Config, start: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        values = {name: value for name, value in flat(cfg).items() if isinstance(value, (bool, int, float, str))}
        events: Any = self.train.file_writer
        for each in hparams(values, {LOSS: 0.0}):
            events.add_summary(each)
        for name, told in (("versions", versions()), ("config", values)):
            self.train.add_text(f"run/{name}", f"```\n{json.dumps(told, indent=1)}\n```", start)
        self.train.add_text("run/command", f"```\n{command()}\n```", start)

    def write(self, row: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        """An iteration, and the validation losses behind it."""
        known = {name: value for name, value in row.items() if value is not None and name != "iteration"}
        _add(self.train, {TAGS.get(name, f"totals/{name}"): value for name, value in known.items()}, row["iteration"])
        sources = {name.partition("/")[2]: value for name, value in losses.items()}
        _add(self.validation, {f"loss/{s}" if s else LOSS: value for s, value in sources.items()}, row["iteration"])

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers of an iteration by their tags."""
        _add(self.train, values, iteration)

    def samples(self, iteration: int, texts: Sequence[tuple[str, str]]) -> None:
        """Prompts and the texts to them."""
        for number, (prompt, text) in enumerate(texts):
            self.train.add_text(f"samples/{number}", f"```\n{prompt}{text}\n```", iteration)

    def close(self) -> None:
        """End the events."""
        self.train.close()
        self.validation.close()
