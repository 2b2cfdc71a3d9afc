"""LLaMA one token after the other: keys and values of what was read are kept, so that a token costs one column.

Letters as in llama.py; S is the length of the cache. Rows of a batch may stand at different positions: a prompt shorter
than the longest is padded behind its end, and what the padding left in the cache is overwritten before it is read.
"""

from __future__ import annotations

import torch

import kernels as k
from kernels.rms_norm import upcast
from kernels.scope import named_scope
from kernels.scope_names import layer
from llama_fn import tree
from llama_fn.config import ModelConfig
from llama_fn.model import llama, weights
from llama_fn.model.arrays import DTYPES, ArrayInfo
from llama_fn.tree import Leaf


@tree.dataclass
class Cache:
    """Keys, turned by their positions, and values of every layer, [L, B, S, K, H] in the compute dtype."""

    keys: Leaf
    values: Leaf


def abstract_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """The declaration of a cache."""
    shape = (cfg.num_layers, batch, length, cfg.num_kv_heads, cfg.head_dim)
    info = ArrayInfo(shape, DTYPES[cfg.compute_dtype], stays=True)
    return Cache(info, info)


def prefill(
    cache: Cache, params: llama.Params, tokens_BT: torch.Tensor, lengths_B: torch.Tensor, *, cfg: ModelConfig
) -> tuple[Cache, torch.Tensor]:
    """The cache with the prompts in its first T places, and the logits [B, V] float32 behind each prompt's end."""
    params = weights.gather(params, llama.abstract_params(cfg))
    with named_scope("embed"):
        cos, sin = llama.rope_table(tokens_BT, tokens_BT.shape[1], cfg=cfg)
        x_BTD = k.embedding(params.embed, tokens_BT)
    keys, values = [], []
    for i, p in enumerate(params.layers):
        with named_scope(layer(i)):
            q_BTNH, k_BTKH, v_BTKH = _products(p, x_BTD, cfg)
            q_BTNH, k_BTKH = k.rope(q_BTNH, cos, sin, False), k.rope(k_BTKH, cos, sin, False)
            o_BTNH = k.attention(q_BTNH, k_BTKH, v_BTKH, cfg.head_dim**-0.5)[0]
            x_BTD = _rest(p, x_BTD, o_BTNH, cfg)
        keys.append(_padded(k_BTKH, cache.keys.shape[2]))
        values.append(_padded(v_BTKH, cache.values.shape[2]))
    last = torch.nn.functional.one_hot(lengths_B - 1, tokens_BT.shape[1]).to(x_BTD.dtype)
    logits_BV = _logits(params, (x_BTD * last[:, :, None]).sum(1, keepdim=True), cfg)
    return Cache(torch.stack(keys), torch.stack(values)), logits_BV


def decode(
    cache: Cache, params: llama.Params, tokens_B: torch.Tensor, positions_B: torch.Tensor, *, cfg: ModelConfig
) -> tuple[Cache, torch.Tensor]:
    """The cache with one more token of each row, at its position, and the logits [B, V] float32 behind it."""
    params = weights.gather(params, llama.abstract_params(cfg))
    length = cache.keys.shape[2]
    with named_scope("embed"):
        table = llama.rope_table(tokens_B, length, cfg=cfg)
        cos_BR, sin_BR = (torch.nn.functional.embedding(positions_B, part) for part in table)
        x_BTD = k.embedding(params.embed, tokens_B[:, None])
    places_BS = torch.arange(length, device=tokens_B.device)[None, :] == positions_B[:, None]
    ahead_BS = torch.arange(length, device=tokens_B.device)[None, :] > positions_B[:, None]
    keys, values = [], []
    olds = zip(cache.keys.unbind(), cache.values.unbind(), strict=True)
    for i, (p, (old_keys, old_values)) in enumerate(zip(params.layers, olds, strict=True)):
        with named_scope(layer(i)):
            q_BTNH, k_BTKH, v_BTKH = _products(p, x_BTD, cfg)
            here = places_BS[:, :, None, None]
            keys.append(torch.where(here, _turned(k_BTKH, cos_BR, sin_BR), old_keys))
            values.append(torch.where(here, v_BTKH, old_values))
            o_BTNH = _attended(_turned(q_BTNH, cos_BR, sin_BR), keys[-1], values[-1], ahead_BS, cfg)
            x_BTD = _rest(p, x_BTD, o_BTNH, cfg)
    return Cache(torch.stack(keys), torch.stack(values)), _logits(params, x_BTD, cfg)


def _products(p: llama.Layer, x_BTD: torch.Tensor, cfg: ModelConfig) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, not turned yet."""
    return llama.queries_keys_values(p, k.rms_norm(x_BTD, p.attn_norm, cfg.norm_eps)[0], cfg=cfg)


def _rest(p: llama.Layer, x_BTD: torch.Tensor, o_BTNH: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """What of a layer stands behind the attention."""
    return llama.mlp_block(p, x_BTD + k.einsum("btnh,nhd->btd", o_BTNH, p.wo), cfg=cfg)


def _turned(x_BTNH: torch.Tensor, cos_BR: torch.Tensor, sin_BR: torch.Tensor) -> torch.Tensor:
    """k.rope for rows at positions of their own."""
    half = x_BTNH.shape[-1] // 2
    first, second = upcast(x_BTNH[..., :half]), upcast(x_BTNH[..., half:])
    cos, sin = cos_BR[:, None, None, :], sin_BR[:, None, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BTNH.dtype)


def _attended(
    q_BTNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor, ahead_BS: torch.Tensor, cfg: ModelConfig
) -> torch.Tensor:
    """Attention of one query of each row over all that its row has read, itself included."""
    q_BKGH = q_BTNH[:, 0].unflatten(1, (cfg.num_kv_heads, -1))
    scores_BKGS = upcast(k.einsum("bkgh,bskh->bkgs", q_BKGH, k_BSKH)) * cfg.head_dim**-0.5
    scores_BKGS = scores_BKGS.masked_fill(ahead_BS[:, None, None, :], float("-inf"))
    weights_BKGS = torch.softmax(scores_BKGS, -1).to(v_BSKH.dtype)
    return k.einsum("bkgs,bskh->bkgh", weights_BKGS, v_BSKH).flatten(1, 2)[:, None]


def _padded(x_BTKH: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(x_BTKH, (0, 0, 0, 0, 0, length - x_BTKH.shape[1]))


def _logits(params: llama.Params, x_BTD: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """[B, V] in float32, of one column."""
    with named_scope("head"):
        n_BTD = k.rms_norm(x_BTD, params.final_norm, cfg.norm_eps)[0]
        return upcast(k.einsum("btd,vd->btv", n_BTD, llama.head(params)))[:, 0]
