"""Names, units and destinations of a run's numbers: train.log, metrics.jsonl, TensorBoard, the terminal.

metrics.jsonl is the source of truth: one object per logged iteration, each value that JSON has no number for null and
named in `nonfinite`. skipped_iterations and nan_iterations count since iteration 0. An iteration behind which there was
a validation is always logged, with its losses. train.log has the same iterations in Megatron's format, and a line per
validation.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_fn.config import Config
from llama_fn.hardware import Hardware
from llama_fn.model.flops import hardware_flops_per_token, model_flops_per_token
from llama_fn.run import norms
from llama_fn.run.board import Board
from llama_fn.run.log_files import keep_lines, keep_records, set_aside
from llama_fn.run.trackers import trackers
from sharding import Mesh

log = logging.getLogger("llama_fn.metrics")
LINE = (
    " iteration {iteration:8d}/{steps:8d} | consumed samples: {consumed_samples:12d} |"
    " consumed tokens: {consumed_tokens:12d} | elapsed time per iteration (ms): {step_time_ms:.1f} |"
    " learning rate: {learning_rate:.3E} | global batch size: {global_batch_size:5d} | lm loss: {lm_loss:.6E} |"
    " loss scale: {loss_scale:.1f} | grad norm: {grad_norm:.3f} | actual seqlen: {seq_len:5d} |"
    " number of skipped iterations: {skipped_iterations:3d} | number of nan iterations: {nan_iterations:3d} |"
    " samples per second: {samples_per_second:.3f} | TFLOPs: {tflops_hardware:.2f} |"
)


def record(
    cfg: Config,
    iteration: int,
    values: Mapping[str, float],
    seconds: float,
    waited: float,
    hw: Hardware | None,
    consumed: Mapping[str, int],
) -> dict[str, Any]:
    """The numbers of one iteration. `consumed`: samples and tokens so far, as the iterator counted them, and
    global_batch_size, the samples of this iteration. `waited`:
    those of the seconds that passed until its batch was there.

    tokens_per_second is that of all devices, tflops_hardware
    AscendSpeed's count per device, mfu a device's model FLOPs against its peak, None where the peak is unknown."""
    d, m = cfg.data, cfg.model
    tokens = consumed["global_batch_size"] * d.seq_len
    per_s = tokens / seconds
    flops = hardware_flops_per_token(m, d.seq_len, cfg.mesh.remat == "full")
    on_one = per_s / Mesh.parse(cfg.mesh.axes).size
    return {
        "iteration": iteration,
        "global_batch_size": consumed["global_batch_size"],
        "consumed_samples": consumed["consumed_samples"],
        "consumed_tokens": consumed["consumed_tokens"],
        "lm_loss": values["lm_loss"],
        "learning_rate": values["learning_rate"],
        "grad_norm": values["grad_norm"],
        "loss_scale": values["loss_scale"],
        "skipped_iterations": int(values["skipped_iterations"]),
        "nan_iterations": int(values["nan_iterations"]),
        "nonfinite_params": int(values["nonfinite_params"]),
        "step_time_ms": seconds * 1e3,
        "data_wait_ms": waited * 1e3,
        "tokens_per_second": per_s,
        "tflops_hardware": flops * on_one / 1e12,
        "mfu": None if hw is None else model_flops_per_token(m, d.seq_len) * on_one / hw.peak_flops_per_s,
    }


def line(cfg: Config, row: Mapping[str, Any]) -> str:
    """The Megatron line of one record."""
    rate = row["global_batch_size"] / row["step_time_ms"] * 1e3
    return LINE.format(**row, steps=cfg.run.steps, seq_len=cfg.data.seq_len, samples_per_second=rate)


def validation(by_source: Mapping[str, float]) -> dict[str, float]:
    """validation_loss, nats per token: the mean of the sources; and that of each, where there are several."""
    mean = sum(by_source.values()) / len(by_source)
    several = by_source.items() if len(by_source) > 1 else ()
    return {"validation_loss": mean, **{f"validation_loss/{name}": loss for name, loss in several}}


def validation_lines(iteration: int, losses: Mapping[str, float]) -> list[str]:
    """The lines of train.log for what `validation` returned."""
    lines = []
    for name, loss in losses.items():
        of = f" {source} |" if (source := name.partition("/")[2]) else ""
        lines.append(
            f" validation loss at iteration {iteration} |{of} lm loss value: {loss:.6E} | lm loss PPL: "
            f"{_exp(loss):.6E} |"
        )
    return lines


def as_json(row: Mapping[str, Any]) -> str:
    """A record as JSON, which has no nan and no inf: null, and `nonfinite` says which it is."""
    odd = {name: str(value) for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({**row, **dict.fromkeys(odd), "nonfinite": odd}, allow_nan=False)


class Writer:
    """Writes records to every destination. After a resume at iteration `start`, what an earlier process wrote of later
    iterations is dropped first, as it comes again; a run that begins at 0 sets the logs of an older one aside."""

    def __init__(self, cfg: Config, workdir: Path, start: int) -> None:
        self.cfg = cfg
        self.path = workdir / "metrics.jsonl"
        log_path, norms_path = workdir / "train.log", workdir / norms.FILE
        if start:
            keep_records(self.path, start)
            keep_records(norms_path, start)
            keep_lines(log_path, start)
        else:
            set_aside([self.path, log_path, norms_path])
        self.jsonl = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.text = open(log_path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.trackers = trackers(cfg, workdir)
        self.board = Board(cfg, workdir / "tensorboard", start) if cfg.run.tensorboard else None
        self.norms = norms.NormsLog(norms_path, self.board) if cfg.run.norms_every else None

    def note(self, text: str) -> None:
        """A line of train.log that is not a record."""
        self.text.write(text + "\n")

    def write(self, row: Mapping[str, Any], losses: Mapping[str, float]) -> str:
        """Write an iteration and what `validation` said behind it to all logs; returns its line of train.log."""
        text = line(self.cfg, row)
        self.jsonl.write(as_json({**row, **losses}) + "\n")
        self.text.write("".join(f"{each}\n" for each in (text, *validation_lines(row["iteration"], losses))))
        if self.board:
            self.board.write(row, losses)
        for tracker in self.trackers:
            tracker.write(row, losses)
        return text

    def samples(self, iteration: int, texts: Sequence[tuple[str, str]]) -> list[str]:
        """Write prompts and the texts to them; returns their lines of train.log, in which a line break is \\n."""
        lines = [f" sample at iteration {iteration} | {json.dumps([p, t], ensure_ascii=False)}" for p, t in texts]
        for each in lines:
            self.note(each)
        if self.board:
            self.board.samples(iteration, texts)
        return lines

    def sync(self) -> None:
        """Until the logs are on disk: before a checkpoint, from which a later process goes on behind them."""
        for f in (self.jsonl, self.text):
            f.flush()
            os.fsync(f.fileno())
        if self.norms:
            self.norms.sync()

    def close(self) -> None:
        """End all logs."""
        for f in (self.jsonl, self.text, self.norms, self.board, *self.trackers):
            if f is not None:
                f.close()


def _exp(loss: float) -> float:
    return math.exp(min(loss, 20.0))
