"""FLOPs of a token by formula, from a model's shape: the two counts that logs print, and what each is good for."""

from __future__ import annotations

from llama_fn.config import ModelConfig


def hardware_flops_per_token(m: ModelConfig, seq_len: int, recompute: bool) -> float:
    """AscendSpeed's count, 24 c L h^2 (1 + s/(6h) + V/(16 L h)) with c = 4 under full recompute, else 3.

    It takes F = 8h/3, MHA and uncut attention, so it is a convention for comparing runs, not a measurement.
    """
    c, h = (4 if recompute else 3), m.embed_dim
    return 24 * c * m.num_layers * h**2 * (1 + seq_len / (6 * h) + m.vocab_size / (16 * m.num_layers * h))


def model_flops_per_token(m: ModelConfig, seq_len: int) -> float:
    """For MFU: 6 per matrix parameter, and causal attention at half (6 N H s per layer), forward and backward."""
    d, h = m.embed_dim, m.head_dim
    per_layer = 2 * d * m.num_heads * h + 2 * d * m.num_kv_heads * h + 3 * d * m.mlp_dim
    matrices = m.num_layers * per_layer + m.vocab_size * d
    return 6 * matrices + 6 * m.num_heads * h * seq_len * m.num_layers
