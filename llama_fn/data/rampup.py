"""Batches that grow while a run is young: --data.rampup=START,STEP,SAMPLES, as Megatron's --rampup-batch-size.

The first batches have START samples; the size grows by STEP at equal distances of consumed samples, and is
data.global_batch_size once SAMPLES are consumed. A microbatch always has the same size: there are fewer at first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama_fn.config import Config, DataConfig
from llama_fn.config_checks import whole_number
from llama_fn.data.skips import Ranges, after, ahead
from llama_fn.errors import UserError


@dataclass(frozen=True)
class Rampup:
    """Batch sizes in samples, and over how many consumed samples they grow; `step` 0: `end` from the beginning."""

    start: int
    step: int
    samples: int
    end: int

    def size(self, consumed: int) -> int:
        """Of the next batch of a run that has consumed so many samples."""
        if not self.step or consumed > self.samples:
            return self.end
        # In floating point as Megatron has it (num_microbatches_calculator.py), so that a run changes where its does.
        return self.start + int(consumed / (self.samples / ((self.end - self.start) // self.step))) * self.step

    def sizes(self, consumed: int) -> list[int]:
        """All from there on, rising."""
        return [*range(self.size(consumed), self.end, self.step or self.end), self.end]

    def reached(self, consumed: int, batches: int, skipped: Ranges) -> int:
        """How many samples are consumed after so many batches more; more where ranges to skip lie behind them."""
        while batches and self.size(consumed) < self.end:
            size = self.size(consumed)
            consumed, batches = after(consumed, size, skipped) + size, batches - 1
        return consumed + batches * self.end + ahead(consumed, self.end, skipped)


def of(d: DataConfig) -> Rampup:
    """What --data.rampup says. UserError where it is not three numbers, or gives sizes that the run cannot have."""
    if not d.rampup:
        return Rampup(d.global_batch_size, 0, 0, d.global_batch_size)
    numbers = [whole_number(word.strip()) for word in d.rampup.split(",")]
    start, step, samples = [n or 0 for n in numbers] if len(numbers) == 3 else (0, 0, 0)
    if not (start and step and samples):
        raise UserError(
            f"--data.rampup={d.rampup} is not START,STEP,SAMPLES: samples of the first batches, how many more they get "
            "at a time, and after how many consumed samples they have --data.global_batch_size; such as 16,16,300000"
        )
    end, part = d.global_batch_size, d.global_batch_size // d.microbatches
    if start >= end or (end - start) % step:
        raise UserError(
            f"--data.rampup={d.rampup}: from {start} in steps of {step} is no way to --data.global_batch_size={end}"
        )
    if start % part or step % part:
        raise UserError(
            f"--data.rampup={d.rampup}: START and STEP must be multiples of a microbatch, which has {part} samples "
            f"(--data.global_batch_size={end} over --data.microbatches={d.microbatches})"
        )
    return Rampup(start, step, samples, end)


def configs(cfg: Config, consumed: int) -> Iterator[Config]:
    """cfg for each size of batches that is to come after so many consumed samples, but for its own, the last."""
    part = cfg.data.global_batch_size // cfg.data.microbatches
    for size in of(cfg.data).sizes(consumed)[:-1]:
        yield replace(cfg, data=replace(cfg.data, rampup="", global_batch_size=size, microbatches=size // part))
