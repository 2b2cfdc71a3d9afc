"""The numbers of a step that may change without another graph: its hyper-parameters, as scalar inputs.

What changes the graph (the kind of schedule, dtypes, how often gradients are reduced) is in the Config alone.
"""

from __future__ import annotations

import math

from llama_fn import tree
from llama_fn.config import Config
from llama_fn.model import arrays, random
from llama_fn.model.arrays import DTYPES, ArrayInfo, Init
from llama_fn.tree import Leaf

NO_CLIP = 1e30  # a limit that no gradient reaches, and whose quotient by any norm is finite
LOG_OF_ZERO = -1e4  # whose exponential is 0


@tree.dataclass
class Hyper:
    """Scalars in the dtype of the masters. 1 - b and log b are inputs of their own, as float32 would lose digits of
    them: 1 - 0.999 has 16 ppm of error if 0.999 is rounded first."""

    lr: Leaf
    min_lr: Leaf
    warmup_steps: Leaf
    warmup_lr: Leaf  # how much the rate rises per update of the warmup
    decay_steps: Leaf  # between the end of the warmup and min_lr
    b1: Leaf
    b1_rest: Leaf  # 1 - b1
    b1_log: Leaf
    b2: Leaf
    b2_rest: Leaf
    b2_log: Leaf
    eps: Leaf
    weight_decay: Leaf
    clip: Leaf
    loss_scale_window: Leaf


def abstract_hyper(cfg: Config) -> Hyper:
    """The declaration of the hyper-parameters; their values are its init."""
    o, dtype = cfg.optim, DTYPES["fp64" if cfg.model.compute_dtype == "fp64" else "fp32"]
    decayed = max(o.decay_steps or cfg.run.steps, o.warmup_steps + 1)

    def scalar(value: float) -> ArrayInfo:
        return ArrayInfo((), dtype, init=Init(value=value), stays=True)

    return Hyper(
        lr=scalar(o.lr),
        min_lr=scalar(o.min_lr),
        warmup_steps=scalar(o.warmup_steps),
        warmup_lr=scalar(o.lr / max(o.warmup_steps, 1)),
        decay_steps=scalar(decayed - o.warmup_steps),
        b1=scalar(o.b1),
        b1_rest=scalar(1 - o.b1),
        b1_log=scalar(_log(o.b1)),
        b2=scalar(o.b2),
        b2_rest=scalar(1 - o.b2),
        b2_log=scalar(_log(o.b2)),
        eps=scalar(o.eps),
        weight_decay=scalar(o.weight_decay),
        clip=scalar(o.clip or NO_CLIP),
        loss_scale_window=scalar(o.loss_scale_window),
    )


def hyperparameters(cfg: Config, device: str = "cpu") -> Hyper:
    """The hyper-parameters of a run, as tensors on `device`."""
    values: Hyper = arrays.materialize(abstract_hyper(cfg), random.key(0), device)
    return values


def _log(base: float) -> float:
    return math.log(base) if base > 0 else LOG_OF_ZERO
