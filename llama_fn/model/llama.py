"""LLaMA (Touvron et al. 2023) as pure functions over stacked layer parameters.

Letters: B batch, T query, S key, D embed, N query heads, K kv heads, H head dim, F mlp, V vocab, L layers.
"""

from __future__ import annotations

import math

import torch

import kernels as k
from kernels import checkpoint_name as name
from kernels.scope import caller, named_scope
from kernels.scope_names import layer
from llama_fn import tree
from llama_fn.config import ModelConfig
from llama_fn.model.arrays import ArrayInfo, Init
from llama_fn.model.transforms import inlined, remat
from llama_fn.tree import Leaf, Tree
from sharding import P, constrain

RESIDUAL = P("batch", "seq", "embed")  # between blocks
BLOCK = P("batch", "full_seq", "embed")  # what a block's first products read
QUERIES, KEYS = (P("batch", "attn_seq", heads, "head_dim") for heads in ("attn_heads", "attn_kv_heads"))


@tree.dataclass
class Layer:
    """Parameters of the layers, stacked: every leaf has a leading L dimension. Biases and norms of queries and keys are
    None where the model has none."""

    attn_norm: Leaf  # [L, D]
    wq: Leaf  # [L, D, N, H]
    wk: Leaf  # [L, D, K, H]
    wv: Leaf  # [L, D, K, H]
    bq: Leaf  # [L, N, H]
    bk: Leaf  # [L, K, H]
    bv: Leaf  # [L, K, H]
    q_norm: Leaf  # [L, H]
    k_norm: Leaf  # [L, H]
    wo: Leaf  # [L, N, H, D]
    mlp_norm: Leaf  # [L, D]
    w_gate: Leaf  # [L, D, F]
    w_up: Leaf  # [L, D, F]
    w_down: Leaf  # [L, F, D]


@tree.dataclass
class Params:
    """All parameters; lm_head is None where the embedding is tied."""

    embed: Leaf  # [V, D]
    layers: Tree  # a Layer of stacked leaves; after weights.gather a list of them, one per layer
    final_norm: Leaf  # [D]
    lm_head: Leaf  # [V, D]


def abstract_params(cfg: ModelConfig) -> Params:
    """The declaration of every parameter, float32 (float64 to compute in that): shape, logical axes and init (GPT-2's
    scaled residual init)."""
    d, n, kv, h, f, v, layers = (
        cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.mlp_dim, cfg.vocab_size, cfg.num_layers,
    )  # fmt: skip
    dtype = torch.float64 if cfg.compute_dtype == "fp64" else torch.float32
    matrix = Init(std=cfg.init_std)
    residual = Init(std=cfg.init_std / math.sqrt(2 * layers)) if cfg.init_scaled else matrix
    one, zero = Init(value=1.0), Init()

    def info(shape: tuple[int, ...], axes: tuple[str, ...], init: Init = matrix) -> ArrayInfo:
        return ArrayInfo(shape, dtype, axes, init, source=caller())

    def stacked(shape: tuple[int, ...], axes: tuple[str, ...], init: Init = matrix) -> ArrayInfo:
        return ArrayInfo((layers, *shape), dtype, ("layers", *axes), init, source=caller())

    return Params(
        embed=info((v, d), ("vocab", "embed")),
        layers=Layer(
            attn_norm=stacked((d,), ("embed",), one),
            wq=stacked((d, n, h), ("embed", "heads", "head_dim")),
            wk=stacked((d, kv, h), ("embed", "kv_heads", "head_dim")),
            wv=stacked((d, kv, h), ("embed", "kv_heads", "head_dim")),
            bq=stacked((n, h), ("heads", "head_dim"), zero) if cfg.qkv_bias else None,
            bk=stacked((kv, h), ("kv_heads", "head_dim"), zero) if cfg.qkv_bias else None,
            bv=stacked((kv, h), ("kv_heads", "head_dim"), zero) if cfg.qkv_bias else None,
            q_norm=stacked((h,), ("head_dim",), one) if cfg.qk_norm else None,
            k_norm=stacked((h,), ("head_dim",), one) if cfg.qk_norm else None,
            wo=stacked((n, h, d), ("heads", "head_dim", "embed"), residual),
            mlp_norm=stacked((d,), ("embed",), one),
            w_gate=stacked((d, f), ("embed", "mlp")),
            w_up=stacked((d, f), ("embed", "mlp")),
            w_down=stacked((f, d), ("mlp", "embed"), residual),
        ),
        final_norm=info((d,), ("embed",), one),
        lm_head=None if cfg.tie_embeddings else info((v, d), ("vocab", "embed")),
    )


def queries_keys_values(p: Layer, n_BTD: torch.Tensor, *, cfg: ModelConfig) -> tuple[torch.Tensor, ...]:
    """[B, T, N, H] and twice [B, S, K, H] of the normed input, not turned yet; of Qwen 2 with biases, of Qwen 3 queries
    and keys normed."""
    q_BTNH = constrain(_biased(k.einsum("btd,dnh->btnh", n_BTD, p.wq), p.bq), QUERIES)
    k_BSKH = constrain(_biased(k.einsum("btd,dkh->btkh", n_BTD, p.wk), p.bk), KEYS)
    v_BSKH = name(constrain(_biased(k.einsum("btd,dkh->btkh", n_BTD, p.wv), p.bv), KEYS), "value")
    if cfg.qk_norm:
        q_BTNH = k.rms_norm(q_BTNH, p.q_norm, cfg.norm_eps)[0]
        k_BSKH = k.rms_norm(k_BSKH, p.k_norm, cfg.norm_eps)[0]
    return q_BTNH, k_BSKH, v_BSKH


def _biased(x_BTNH: torch.Tensor, bias_NH: Leaf) -> torch.Tensor:
    return x_BTNH if bias_NH is None else k.bias(x_BTNH, bias_NH)


@tree.dataclass
class Places:
    """Where the tokens of each row stand: the rotary table, and with several documents in a row the position of each
    token in its own, and where that begins, [B, T]."""

    cos: Leaf
    sin: Leaf
    positions: Leaf = None
    starts: Leaf = None

    def turned(self, x_BTNH: torch.Tensor) -> torch.Tensor:
        """k.rope at these places."""
        positions = () if self.positions is None else (self.positions,)
        turned: torch.Tensor = k.rope(x_BTNH, self.cos, self.sin, False, *positions)
        return turned


def attention_block(p: Layer, x_BTD: torch.Tensor, places: Places, *, cfg: ModelConfig) -> torch.Tensor:
    """x + wo(attention(rope(wq n), rope(wk n), wv n)) with n = rms_norm(x)."""
    with named_scope("attention"):
        n_BTD = constrain(k.rms_norm(x_BTD, p.attn_norm, cfg.norm_eps)[0], BLOCK)
        q_BTNH, k_BSKH, v_BSKH = queries_keys_values(p, n_BTD, cfg=cfg)
        q_BTNH, k_BSKH = name(places.turned(q_BTNH), "query"), name(places.turned(k_BSKH), "key")
        starts = () if places.starts is None else (places.starts,)
        o_BTNH = name(k.attention(q_BTNH, k_BSKH, v_BSKH, cfg.head_dim**-0.5, *starts)[0], "context")
        o_BTNH = constrain(o_BTNH, P("batch", "full_seq", "heads", "head_dim"))
        return x_BTD + name(constrain(k.einsum("btnh,nhd->btd", o_BTNH, p.wo), RESIDUAL), "out_proj")


def mlp_block(p: Layer, x_BTD: torch.Tensor, *, cfg: ModelConfig) -> torch.Tensor:
    """x + w_down(silu(w_gate n) * w_up n) with n = rms_norm(x)."""
    with named_scope("mlp"):
        n_BTD = constrain(k.rms_norm(x_BTD, p.mlp_norm, cfg.norm_eps)[0], BLOCK)
        gate_BTF = name(k.einsum("btd,df->btf", n_BTD, p.w_gate), "gate")
        h_BTF = k.swiglu(gate_BTF, name(k.einsum("btd,df->btf", n_BTD, p.w_up), "up"))
        return x_BTD + constrain(k.einsum("btf,fd->btd", h_BTF, p.w_down), RESIDUAL)


def rope_table(like: torch.Tensor, length: int, *, cfg: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """k.rope_table for positions 0..length-1, with the scaling that the model has."""
    scaling = [list(cfg.rope_scaling)] if cfg.rope_scaling else []
    cos, sin = k.rope_table(like, length, cfg.head_dim, cfg.rope_theta, *scaling)
    return cos, sin


def _places(tokens_BT: torch.Tensor, starts_BT: torch.Tensor | None, cfg: ModelConfig) -> Places:
    cos, sin = rope_table(tokens_BT, tokens_BT.shape[1], cfg=cfg)
    if starts_BT is None:
        return Places(cos, sin)
    starts_BT = constrain(starts_BT, P("batch", "attn_seq"))
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) - starts_BT
    return Places(cos, sin, positions_BT, starts_BT)


def hidden(
    params: Params, tokens_BT: torch.Tensor, starts_BT: torch.Tensor | None = None, *, cfg: ModelConfig
) -> torch.Tensor:
    """Normed output of the last layer, [B, T, D] in the parameters' dtype, for integer tokens [B, T] and parameters
    from weights.gather. `starts_BT`: where in its row the document of each token begins; without, a row is one."""
    with named_scope("embed"):
        places = _places(tokens_BT, starts_BT, cfg)
        x_BTD = constrain(k.embedding(params.embed, tokens_BT), RESIDUAL)

    @inlined
    def block(p: Layer, x_BTD: torch.Tensor, places: Places) -> torch.Tensor:
        return mlp_block(p, attention_block(p, x_BTD, places, cfg=cfg), cfg=cfg)

    for i, weights in enumerate(params.layers):
        with named_scope(layer(i)):
            x_BTD = remat(block)(weights, x_BTD, places)
    with named_scope("final_norm"):
        return constrain(k.rms_norm(x_BTD, params.final_norm, cfg.norm_eps)[0], BLOCK)


def head(params: Params) -> torch.Tensor:
    """The output head [V, D]: the embedding where it is tied."""
    return params.embed if params.lm_head is None else params.lm_head


def logits(
    params: Params, tokens_BT: torch.Tensor, starts_BT: torch.Tensor | None = None, *, cfg: ModelConfig
) -> torch.Tensor:
    """[B, T, V] in the parameters' dtype."""
    x_BTD = hidden(params, tokens_BT, starts_BT, cfg=cfg)
    with named_scope("head"):
        return k.einsum("btd,vd->btv", x_BTD, head(params))


def nll(
    params: Params, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, starts_BT: torch.Tensor | None = None, *,
    cfg: ModelConfig,
) -> torch.Tensor:  # fmt: skip
    """Negative log-likelihood of each target in nats, [B, T] float32; `starts_BT` as for :func:`hidden`."""
    if cfg.fused_head:
        x_BTD = hidden(params, tokens_BT, starts_BT, cfg=cfg)
        with named_scope("head"):
            return k.head_cross_entropy(x_BTD, head(params), targets_BT)[0]
    logits_BTV = logits(params, tokens_BT, starts_BT, cfg=cfg)
    with named_scope("loss"):
        return k.cross_entropy(logits_BTV, targets_BT)[0]
