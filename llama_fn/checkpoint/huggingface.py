"""Names, shapes and configuration of LLaMA weights on Hugging Face, and ours.

Hugging Face keeps each layer's tensors apart, products as [out, in], heads and their dimension as one. Ours are stacked
over the layers, products as [in, out], heads apart. Both turn the two halves of a head by the rotary angle, so a tensor
becomes the other's by reshaping and transposing alone: the same bits, both ways. Source: transformers'
modeling_llama.py and LlamaConfig.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_fn.config import ModelConfig
from llama_fn.errors import UserError

# By name: whether queries, keys and values have biases, and whether queries and keys are normed.
ARCHITECTURES = {
    "LlamaForCausalLM": (False, False), "MistralForCausalLM": (False, False), "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}  # fmt: skip
_TOP = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_LAYER = {
    "attn_norm": "input_layernorm", "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj", "w_down": "mlp.down_proj",
}  # fmt: skip
_BIASES = {"bq": "self_attn.q_proj", "bk": "self_attn.k_proj", "bv": "self_attn.v_proj"}
_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_TURNED = frozenset({"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"})
_INTO = frozenset({"wo", "w_down"})  # whose last dimension is what comes out; of the others the first is what goes in
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Tensor:
    """One of Hugging Face's: its name, the path of our array, and which layer of it, None where it is not stacked."""

    name: str
    path: str
    layer: int | None

    @property
    def kind(self) -> str:
        """What it is of a layer, or of the model: "wq"."""
        return self.path.rsplit(".", 1)[-1]

    def ours(self, theirs: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Hugging Face's values in our order, `shape` without the layers. ValueError where they do not go in."""
        return (theirs.T if self.kind in _TURNED else theirs).reshape(shape)

    def theirs(self, ours: torch.Tensor) -> torch.Tensor:
        """Our values in Hugging Face's order."""
        if self.kind not in _TURNED:
            return ours.flatten() if self.kind in _BIASES else ours
        split = ours.dim() - 1 if self.kind in _INTO else 1  # dimensions before it are what goes in
        return ours.flatten(split).flatten(0, split - 1).T.contiguous()


def tensors(cfg: ModelConfig) -> Iterator[Tensor]:
    """All of a model, in the order of its layers."""
    yield Tensor(_TOP["embed"], "params.embed", None)
    for i in range(cfg.num_layers):
        for ours, theirs in (_LAYER | (_NORMS if cfg.qk_norm else {})).items():
            yield Tensor(f"model.layers.{i}.{theirs}.weight", f"params.layers.{ours}", i)
        for ours, theirs in (_BIASES if cfg.qkv_bias else {}).items():
            yield Tensor(f"model.layers.{i}.{theirs}.bias", f"params.layers.{ours}", i)
    yield Tensor(_TOP["final_norm"], "params.final_norm", None)
    if not cfg.tie_embeddings:
        yield Tensor(_TOP["lm_head"], "params.lm_head", None)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model; UserError where there is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {folder} is no model of Hugging Face") from None
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no configuration")
    return config


def model_config(config: Mapping[str, Any], where: Path) -> ModelConfig:
    """Ours for a config.json; UserError where the architecture is another, or a part of it that we do not compute."""
    kinds = config.get("architectures") or []
    known = [kind for kind in kinds if kind in ARCHITECTURES]
    if not known:
        raise UserError(
            f"{where}: architectures is {kinds}; llama_fn computes {', '.join(ARCHITECTURES)}, and models that are the "
            "same under another name if you write that name there"
        )
    wrong = {
        "hidden_act": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "sliding_window": config.get("sliding_window") is not None and config.get("use_sliding_window", True),
    }
    if any(wrong.values()):
        names = ", ".join(f"{name}={config[name]!r}" for name, bad in wrong.items() if bad)
        raise UserError(f"{where}: {names}, which llama_fn does not compute")
    try:
        heads = config["num_attention_heads"]
        return ModelConfig(
            preset="converted", num_layers=config["num_hidden_layers"], embed_dim=config["hidden_size"],
            num_heads=heads, num_kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or 0, mlp_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"], norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)), qkv_bias=ARCHITECTURES[known[0]][0],
            qk_norm=ARCHITECTURES[known[0]][1], **_rope(config, where),
        )  # fmt: skip
    except KeyError as missing:
        raise UserError(f"{where} lacks {missing}") from None


def _rope(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Old files have rope_theta and rope_scaling, new ones rope_parameters."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(given.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise UserError(f"{where}: rope_type {kind!r}; llama_fn computes default and llama3")
    return {
        "rope_theta": theta, "rope_factor": float(given["factor"]), "rope_low_freq": float(given["low_freq_factor"]),
        "rope_high_freq": float(given["high_freq_factor"]),
        "rope_length": int(given["original_max_position_embeddings"]),
    }  # fmt: skip


def hf_config(cfg: ModelConfig, dtype: str, length: int, tokens: Mapping[str, int]) -> dict[str, Any]:
    """config.json for ours; `length`: the longest sequence that it was trained on, `tokens`: bos_token_id and such."""
    scaling = {
        "factor": cfg.rope_factor, "low_freq_factor": cfg.rope_low_freq, "high_freq_factor": cfg.rope_high_freq,
        "original_max_position_embeddings": cfg.rope_length, "rope_type": "llama3",
    }  # fmt: skip
    scaled = cfg.rope_factor != 1.0
    names = {(False, False): "Llama", (True, False): "Qwen2", (False, True): "Qwen3"}
    name = names.get((cfg.qkv_bias, cfg.qk_norm))
    if name is None:
        raise UserError("no model of Hugging Face has both the biases and the norms of --model.qkv_bias and qk_norm")
    return {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "hidden_act": "silu",
        "num_hidden_layers": cfg.num_layers, "hidden_size": cfg.embed_dim, "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim, "intermediate_size": cfg.mlp_dim,
        "vocab_size": cfg.vocab_size, "rms_norm_eps": cfg.norm_eps, "tie_word_embeddings": cfg.tie_embeddings,
        "max_position_embeddings": length, "initializer_range": cfg.init_std, "attention_bias": False,
        "mlp_bias": False, "torch_dtype": dtype, "use_cache": True, **tokens,
        # transformers 5 reads the second, vLLM and transformers 4 the first
        "rope_theta": cfg.rope_theta, "rope_scaling": scaling if scaled else None,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **(scaling if scaled else {"rope_type": "default"})},
    }  # fmt: skip
