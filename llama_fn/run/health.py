"""Whether the numbers of a run are still good: when to warn, when not to save, when to stop.

An iteration whose loss or gradients are not finite is skipped, which fp16 does on purpose now and then to find its loss
scale. Many in a row, or parameters that are not finite, mean that no later iteration will mend it. Then the newest
checkpoint from before is what the run is worth, and must not be pushed out by newer ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

log = logging.getLogger("llama_fn.health")
STATUS = 4  # of a process that stopped because of this


@dataclass
class Health:
    """Told the metrics of iterations in order, though not of every one. `limit`: --run.stop_after_skipped; `scaled`:
    the step has a loss scale; `good`: the last iteration that was not skipped, which for a start is what it began from.
    """

    limit: int
    scaled: bool
    good: int
    ruined: bool = False
    routine: bool = True  # since then, nothing but overflows of the loss scale
    warned: bool = False
    skipped: float = 0.0
    stopped_by: str = ""  # what --run.check_finite says

    def __post_init__(self) -> None:
        self.seen = self.good

    def observe(self, iteration: int, values: Mapping[str, float]) -> None:
        """Metrics of a step as numbers."""
        loss, norm, skipped = values["lm_loss"], values["grad_norm"], values["skipped_iterations"]
        self.ruined |= bool(values["nonfinite_params"])
        if math.isfinite(loss) and math.isfinite(norm):
            self.good, self.routine = iteration, True
        else:
            in_a_row = min(skipped - self.skipped, iteration - self.seen)  # of those since the last look, at most
            if in_a_row < iteration - self.seen:
                self.good = iteration - int(in_a_row)
            self.routine &= self.scaled and math.isfinite(loss)
        self.skipped, self.seen = skipped, iteration
        if not self.warned and (self.ruined or not self.routine):
            self.warned = True
            log.warning(
                "iteration %d: loss %s, grad norm %s; %s. Said once; metrics.jsonl counts all of them",
                iteration, loss, norm, "the update left parameters that are not finite" if self.ruined else "skipped",
            )  # fmt: skip

    @property
    def streak(self) -> int:
        """Iterations in a row that were skipped, up to the last one seen."""
        return self.seen - self.good

    @property
    def may_save(self) -> bool:
        """Whether a checkpoint made now is worth more than an older one."""
        return not self.ruined and not self.stopped_by and (self.streak == 0 or self.routine)

    @property
    def verdict(self) -> str:
        """Why the run must stop now, "" while it need not."""
        if self.stopped_by:
            return self.stopped_by
        if self.ruined:
            return f"the update of iteration {self.seen} left parameters that are not finite"
        if self.limit and self.streak >= self.limit:
            return f"{self.streak} iterations in a row were skipped (--run.stop_after_skipped={self.limit})"
        return ""
