"""Jumps of the loss: how one is told from noise, and what a run does about it.

A loss is a spike if it lies far above the median of those before, measured by their own spread (1.4826 times the median
absolute deviation, which is the standard deviation of normal noise and takes no notice of a few outliers). PaLM
(Chowdhery et al. 2022, section 5.1) went back some 100 steps and passed over 200 to 500 batches around each; the same
text trained from another state made no spike. Here a run is bitwise repeatable, so going back without passing over
anything shows whether the machine computed wrong.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

log = logging.getLogger("llama_fn.spikes")
WINDOW, FEWEST = 128, 32  # losses that are looked back at, and how many there must be
SMOOTH = 1e-3  # of the median: a curve that is smoother counts as this noisy
PATIENCE = 3  # times that a run goes back to the same checkpoint


@dataclass(frozen=True)
class Spike:
    """`usual`: the median of the losses before; `deviations`: how many of their spreads this one is above it;
    `consumed`: the samples up to and with this iteration."""

    iteration: int
    loss: float
    usual: float
    deviations: float
    consumed: int

    def __str__(self) -> str:
        return (
            f"iteration {self.iteration}: the loss jumped to {self.loss:.4f}, {self.deviations:.0f} deviations above "
            f"{self.usual:.4f}, the median of those before"
        )


@dataclass
class Spikes:
    """Over all stretches of a process between one going back and the next; told the losses that are logged, in order.
    `action`: --run.on_spike; `deviations`: --run.spike_deviations."""

    action: str
    deviations: float
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    found: Spike | None = None  # that the run must go back for
    told: int = -WINDOW  # the last iteration that was called a spike
    trained_again: dict[int, float] = field(default_factory=dict)  # losses of spikes from before a roll back
    back_at: list[int] = field(default_factory=list)  # the checkpoints that it went back to

    def begin(self, iteration: int, logged: Sequence[tuple[int, float]]) -> None:
        """Train on from this iteration, up to which the log has the losses: a run that was killed, and one that went
        back, measure by the same."""
        self.found, self.told = None, -WINDOW
        kept = [(i, loss) for i, loss in logged if i <= iteration and math.isfinite(loss)]
        self.losses = deque(kept[-WINDOW:], maxlen=WINDOW)

    def observe(self, iteration: int, loss: float, consumed: int) -> Spike | None:
        """The spike that this loss is. Losses that are not finite are run/health.py's."""
        if not self.deviations or not math.isfinite(loss):
            return None
        before = [value for _, value in self.losses]
        spike = self._spike(iteration, loss, consumed, before) if len(before) >= FEWEST else None
        if spike is None or self.action == "warn":  # else it would be what later ones are measured by
            self.losses.append((iteration, loss))
        if spike is None:
            self._gone(iteration)
            return None
        if self.action == "warn":
            new = iteration > self.told + WINDOW
            self.told = iteration
            if new:
                log.warning("%s; --run.on_spike=skip would pass over the data. Said once for each jump", spike)
            return spike if new else None
        self.found = spike
        return spike

    def _spike(self, iteration: int, loss: float, consumed: int, before: list[float]) -> Spike | None:
        usual = statistics.median(before)
        spread = max(1.4826 * statistics.median(abs(x - usual) for x in before), SMOOTH * abs(usual))
        if not spread:  # nothing but zeros, of batches whose tokens are all masked: no curve that could jump
            return None
        above = (loss - usual) / spread
        return Spike(iteration, loss, usual, above, consumed) if above > self.deviations else None

    def _gone(self, iteration: int) -> None:
        """A spike that did not come again: a roll back trains the same numbers on the same data."""
        if self.trained_again.pop(iteration, None) is not None:
            log.error(
                "the jump of the loss at iteration %d did not come again from the same state and data: a machine "
                "computed something else then. Look at it before you trust it", iteration,
            )  # fmt: skip

    @property
    def verdict(self) -> str:
        """Why going back once more would not help, "" where it may."""
        spike = self.found
        if spike is None:
            return ""
        if self.trained_again.get(spike.iteration) == spike.loss:
            return (
                f"{spike}, and did so again from the same state and data, bit for bit: it is the data or the numbers, "
                "no machine. --run.on_spike=skip passes over the data"
            )
        if len(self.back_at) >= PATIENCE and len(set(self.back_at[-PATIENCE:])) == 1:
            return f"{spike}, after the run went back to iteration {self.back_at[-1]} {PATIENCE} times for others"
        return ""

    def went_back(self, iteration: int) -> None:
        """The run goes on from a checkpoint of this iteration because of what was found."""
        assert self.found is not None
        self.back_at.append(iteration)
        if self.action == "roll_back":
            self.trained_again[self.found.iteration] = self.found.loss
        self.found = None
