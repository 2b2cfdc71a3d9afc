"""The shapes of published LLaMAs, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_fn.config import ModelConfig
from llama_fn.errors import UserError, nearest


def _llama(name: str, layers: int, dim: int, heads: int, mlp: int, **more: Any) -> Callable[[], ModelConfig]:
    kv_heads = more.pop("kv_heads", heads)
    shape = {"num_layers": layers, "embed_dim": dim, "num_heads": heads, "num_kv_heads": kv_heads, "mlp_dim": mlp}
    return lambda: ModelConfig(preset=name, **{"vocab_size": 32000, **shape, **more})


# Shapes: LLaMA (Touvron et al. 2023a, table 2), LLaMA-2 (2023b), Llama 3 (Dubey et al. 2024, table 3).
PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "llama_tiny": ModelConfig,
    "llama_60m": _llama("llama_60m", 8, 512, 8, 1376),
    "llama_1b": _llama("llama_1b", 22, 2048, 16, 5504),
    "llama_7b": _llama("llama_7b", 32, 4096, 32, 11008),
    "llama_13b": _llama("llama_13b", 40, 5120, 40, 13824),
    "llama_33b": _llama("llama_33b", 60, 6656, 52, 17920),
    "llama_65b": _llama("llama_65b", 80, 8192, 64, 22016, norm_eps=1e-5),
    "llama_65b_8layers": _llama("llama_65b_8layers", 8, 8192, 64, 22016, norm_eps=1e-5),
    "llama2_70b": _llama("llama2_70b", 80, 8192, 64, 28672, kv_heads=8, norm_eps=1e-5),
    "llama3_8b": _llama(
        "llama3_8b", 32, 4096, 32, 14336, kv_heads=8, norm_eps=1e-5, vocab_size=128256, rope_theta=500000.0
    ),
}


def preset(name: str) -> ModelConfig:
    """The model preset `name`; UserError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"--model.preset={name} is not a preset. {nearest(name, PRESETS)}")
    return PRESETS[name]()
