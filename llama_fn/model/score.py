"""How likely given tokens are: what tests of a model by multiple choice ask."""

from __future__ import annotations

import torch

import kernels as k
from llama_fn.config import ModelConfig
from llama_fn.model import llama, stored
from sharding import P, constrain


def score(
    params: llama.Params, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, *, cfg: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each target in nats, [B, T] float32, and the likeliest token there, [B, T] int64."""
    logits_BTV = constrain(llama.logits(stored.gathered(params, cfg), tokens_BT, cfg=cfg), P("batch", "full_seq", None))
    return k.cross_entropy(logits_BTV, targets_BT)[0], logits_BTV.argmax(-1)
