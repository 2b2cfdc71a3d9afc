"""LLaMA one token after the other: keys and values of what was read are kept, so that a token costs one column.

Letters as in llama.py; S is the length of the cache. Rows of a batch may stand at different positions: a prompt shorter
than the longest is padded behind its end, and what the padding left in the cache is overwritten before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kernels as k
from kernels.rms_norm import upcast
from kernels.scope import named_scope
from kernels.scope_names import layer
from llama_fn import tree
from llama_fn.config import ModelConfig
from llama_fn.model import llama, stored
from llama_fn.model.arrays import DTYPES, ArrayInfo
from llama_fn.tree import Leaf
from sharding import P, constrain


@tree.dataclass
class Cache:
    """Keys, turned by their positions, and values of every layer, [L, B, S, K, H] in the compute dtype."""

    keys: Leaf
    values: Leaf


def abstract_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """The declaration of a cache."""
    shape = (cfg.num_layers, batch, length, cfg.num_kv_heads, cfg.head_dim)
    axes = ("layers", "batch", None, "kv_heads", "head_dim")
    info = ArrayInfo(shape, DTYPES[cfg.compute_dtype], axes, table="compute", stays=True)
    return Cache(info, info)


def prefill(
    cache: Cache, params: llama.Params, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, *, cfg: ModelConfig
) -> tuple[Cache, torch.Tensor]:
    """The cache with the prompts in its first T places, and the logits [B, V] float32 behind each prompt's end."""
    params = stored.gathered(params, cfg)
    with named_scope("embed"):
        cos, sin = llama.rope_table(tokens_BT, tokens_BT.shape[1], cfg=cfg)
        x_BTD = constrain(k.embedding(params.embed, tokens_BT), llama.RESIDUAL)
    first_B = lengths_B - lengths_B
    keys, values = [], []
    for i, (p, old_keys, old_values) in enumerate(_layers(params, cache)):
        with named_scope(layer(i)):
            q_BTNH, k_BTKH, v_BTKH = _products(p, x_BTD, cfg)
            q_BTNH, k_BTKH = k.rope(q_BTNH, cos, sin, False), k.rope(k_BTKH, cos, sin, False)
            o_BTNH = k.attention(q_BTNH, k_BTKH, v_BTKH, cfg.head_dim**-0.5)[0]
            x_BTD = _rest(p, x_BTD, o_BTNH, cfg)
            keys.append(k.cached(old_keys, k_BTKH, first_B))
            values.append(k.cached(old_values, v_BTKH, first_B))
    last = torch.nn.functional.one_hot(lengths_B - 1, tokens_BT.shape[1]).to(x_BTD.dtype)
    logits_BV = _logits(params, (x_BTD * last[:, :, None]).sum(1, keepdim=True), cfg)
    return Cache(k.stack(keys), k.stack(values)), logits_BV


def decode(
    cache: Cache, params: llama.Params, tokens_B: torch.Tensor, positions_B: torch.Tensor, *, cfg: ModelConfig
) -> tuple[Cache, torch.Tensor]:
    """The cache with one more token of each row, at its position, and the logits [B, V] float32 behind it."""
    params = stored.gathered(params, cfg)
    with named_scope("embed"):
        cos, sin = llama.rope_table(tokens_B, cache.keys.shape[2], cfg=cfg)
        x_BTD = constrain(k.embedding(params.embed, tokens_B[:, None]), llama.RESIDUAL)
    keys, values = [], []
    for i, (p, old_keys, old_values) in enumerate(_layers(params, cache)):
        with named_scope(layer(i)):
            q_BTNH, k_BTKH, v_BTKH = _products(p, x_BTD, cfg)
            q_BTNH, k_BTKH = (k.rope(x, cos, sin, False, positions_B[:, None]) for x in (q_BTNH, k_BTKH))
            keys.append(k.cached(old_keys, k_BTKH, positions_B))
            values.append(k.cached(old_values, v_BTKH, positions_B))
            o_BTNH = k.cached_attention(q_BTNH, keys[-1], values[-1], positions_B, cfg.head_dim**-0.5)
            x_BTD = _rest(p, x_BTD, o_BTNH, cfg)
    return Cache(k.stack(keys), k.stack(values)), _logits(params, x_BTD, cfg)


def _layers(params: llama.Params, cache: Cache) -> Iterator[tuple[llama.Layer, torch.Tensor, torch.Tensor]]:
    """Weights, keys and values of each layer."""
    return zip(params.layers, k.unbind(cache.keys), k.unbind(cache.values), strict=True)


def _products(p: llama.Layer, x_BTD: torch.Tensor, cfg: ModelConfig) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, not turned yet."""
    return llama.queries_keys_values(p, k.rms_norm(x_BTD, p.attn_norm, cfg.norm_eps)[0], cfg=cfg)


def _rest(p: llama.Layer, x_BTD: torch.Tensor, o_BTNH: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """What of a layer stands behind the attention."""
    out_BTD = constrain(k.einsum("btnh,nhd->btd", o_BTNH, p.wo), llama.RESIDUAL)
    return llama.mlp_block(p, x_BTD + out_BTD, cfg=cfg)


def _logits(params: llama.Params, x_BTD: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """[B, V] in float32, of one column."""
    with named_scope("head"):
        n_BTD = k.rms_norm(x_BTD, params.final_norm, cfg.norm_eps)[0]
        logits_BTV = constrain(k.einsum("btd,vd->btv", n_BTD, llama.head(params)), P("batch", "full_seq", None))
        return upcast(logits_BTV)[:, 0]
