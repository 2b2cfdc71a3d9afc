"""A LLaMA as an expert writes it for speed, from Hugging Face's files: one product for queries, keys and values and one
for gate and up, torch's fused attention, the loss in chunks. benchmarks/step.py trains it in two ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 512  # tokens whose logits are computed together

Params = dict[str, Any]


def load(folder: str) -> Params:
    """embed, head [V, D], norm [D], and layers: a list of qkv, o, gate_up, down [out, in] and two norms [D]."""
    from safetensors.torch import load_file

    files = load_file(Path(folder) / "model.safetensors")

    def of(i: int, *names: str) -> torch.Tensor:
        return torch.cat([files[f"model.layers.{i}.{name}.weight"] for name in names]).clone()

    layers = []
    while f"model.layers.{(i := len(layers))}.input_layernorm.weight" in files:
        layers.append({
            "attn_norm": of(i, "input_layernorm"),
            "qkv": of(i, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": of(i, "self_attn.o_proj"),
            "mlp_norm": of(i, "post_attention_layernorm"),
            "gate_up": of(i, "mlp.gate_proj", "mlp.up_proj"),
            "down": of(i, "mlp.down_proj"),
        })  # fmt: skip
    embed, head, norm = (files[n] for n in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"))
    return {"embed": embed, "head": head, "norm": norm, "layers": layers}


def rope_table(seq: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, H] of Hugging Face's rotary form."""
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(seq).float(), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-two, one), -1) * sin.to(x.dtype)


def loss(params: Params, tokens: torch.Tensor, targets: torch.Tensor, table: Any, shape: dict) -> torch.Tensor:
    """Mean cross-entropy of targets [B, T] in nats; `shape` says heads and kv_heads."""
    b, t = tokens.shape
    n, k = shape["heads"], shape["kv_heads"]
    x = F.embedding(tokens, params["embed"])
    h = x.shape[-1] // n
    for layer in params["layers"]:
        qkv = F.linear(_norm(x, layer["attn_norm"]), layer["qkv"]).view(b, t, n + 2 * k, h).transpose(1, 2)
        q, key, v = qkv.split((n, k, k), 1)
        q, key = _turned(q, *table), _turned(key, *table)
        o = F.scaled_dot_product_attention(q, key, v, is_causal=True, enable_gqa=n != k)
        x = x + F.linear(o.transpose(1, 2).reshape(b, t, n * h), layer["o"])
        gate, up = F.linear(_norm(x, layer["mlp_norm"]), layer["gate_up"]).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, layer["down"])
    rows, flat = _norm(x, params["norm"]).view(b * t, -1), targets.reshape(-1)
    parts = zip(rows.split(CHUNK), flat.split(CHUNK), strict=True)
    return sum(F.cross_entropy(F.linear(r, params["head"]).float(), f, reduction="sum") for r, f in parts) / (b * t)
