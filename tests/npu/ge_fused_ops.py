"""GE's products and fused ops, as CANN's operator list defines them; with them `OPS` is complete."""

from __future__ import annotations

import torch
from ge_ops import OPS, op, wide

__all__ = ["OPS"]


@op
def MatMul(attrs, a, b, bias=None):
    return (a.t() if attrs["transpose_x1"] else a) @ (b.t() if attrs["transpose_x2"] else b)


@op
def BatchMatMul(attrs, a, b):
    return (a.transpose(-1, -2) if attrs["adj_x1"] else a) @ (b.transpose(-1, -2) if attrs["adj_x2"] else b)


@op
def RmsNorm(attrs, x, gamma):
    """y = x rstd gamma with rstd = 1 / sqrt(mean(x^2) + epsilon); rstd is float32."""
    rstd = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + attrs["epsilon"])
    return (wide(x) * rstd * wide(gamma)).to(x.dtype), rstd


@op
def RmsNormGrad(attrs, dy, x, rstd, gamma):
    """dx, and dgamma in float32."""
    normed, scaled = wide(x) * rstd, wide(dy) * wide(gamma)
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (wide(dy) * normed).sum(tuple(range(x.dim() - 1)))


@op
def RotaryMul(attrs, x, r1, r2):
    """x r1 + rotate_half(x) r2, rotate_half being the halves swapped, the new first one negated."""
    first, second = wide(x).chunk(2, -1)
    return (wide(x) * wide(r1) + torch.cat([-second, first], -1) * wide(r2)).to(x.dtype)


@op
def SwiGlu(attrs, x):
    """silu(first half) times second half along dim."""
    gate, up = wide(x).chunk(2, attrs["dim"])
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


@op
def SwiGluGrad(attrs, dy, x):
    gate, up = wide(x).chunk(2, attrs["dim"])
    s, dy = torch.sigmoid(gate), wide(dy)
    return torch.cat([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], attrs["dim"]).to(x.dtype)


def _scores(attrs, query, key, mask):
    """Scaled scores [B, N, S, S] in float32, masked; layout BNSD. In sparse mode 2 the causal mask comes compressed, in
    mode 0 the whole of it, [B, 1, S, S], for all heads."""
    assert attrs["input_layout"] == "BNSD" and attrs["sparse_mode"] in (0, 2) and attrs["keep_prob"] == 1.0
    assert attrs["head_num"] == query.shape[1]
    t, s = query.shape[2], key.shape[2]
    if attrs["sparse_mode"] == 2:
        assert mask.shape == (2048, 2048) and torch.equal(mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        hidden = torch.arange(s)[None] > torch.arange(t)[:, None]
    else:
        assert mask.shape == (query.shape[0], 1, t, s)
        hidden = mask.bool()
    return (query.float() @ key.float().transpose(-1, -2) * attrs["scale_value"]).masked_fill(hidden, float("-inf"))


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


@op
def FlashAttentionScore(attrs, query, key, value, *rest):
    """softmax_max and softmax_sum [B, N, S, 8], softmax_out (not made), attention_out."""
    mask, heads = rest[3], query.shape[1]
    scores = _scores(attrs, query, _repeated(key, heads), mask)
    top = scores.amax(-1, keepdim=True)
    e = torch.exp(scores - top)
    total = e.sum(-1, keepdim=True)
    # The unnormalized probabilities enter the cube unit in the operands' dtype; the division comes after.
    out = e.to(query.dtype).float() @ _repeated(value, heads).float() / total
    eight = (*total.shape[:-1], 8)
    return top.expand(eight), total.expand(eight), torch.empty(0), out.to(query.dtype)


@op
def FlashAttentionScoreGrad(attrs, query, key, value, dy, *rest):
    """dq, dk, dv, dpse (not made)."""
    mask, top, total, out = rest[3], rest[4], rest[5], rest[7]
    heads, kv = query.shape[1], key.shape[1]
    k, v = _repeated(key, heads), _repeated(value, heads)
    p = torch.exp(_scores(attrs, query, k, mask) - top[..., :1]) / total[..., :1]
    dp = dy.float() @ v.float().transpose(-1, -2)
    delta = (dy.float() * out.float()).sum(-1, keepdim=True)
    ds = (p * (dp - delta)).to(query.dtype).float()
    dq = ds @ k.float() * attrs["scale_value"]
    dk = ds.transpose(-1, -2) @ query.float() * attrs["scale_value"]
    dv = p.to(query.dtype).float().transpose(-1, -2) @ dy.float()
    dk, dv = (x.unflatten(1, (kv, heads // kv)).sum(2) for x in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), torch.empty(0)
