"""Causal grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023).

Letters: B batch, T query, S key, N query heads, K kv heads, G = N/K, H head dim.
`starts` [B, T], where given, is the position at which the document of each token begins: a query sees the keys from
there to itself. Without, a row is one document. `reference` is the formula. A faster form, chosen by name: `blocked`
works on a few blocks of queries against the keys they can see, as plain batched matrix products that a compiler fuses
the softmax into.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.registry import Argument, Factors, kernel
from kernels.rms_norm import upcast

MAX_BLOCKS, MIN_BLOCK = 4, 64


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """[B, T, N, H] -> [B, K, G, T, H]; query head n reads kv head n // G."""
    b, t, n, h = q.shape
    return q.reshape(b, t, kv_heads, n // kv_heads, h).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor) -> Tensor:
    """[B, K, G, T, H] -> [B, T, N, H]."""
    b, k, g, t, h = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(b, t, k * g, h).contiguous()


def _spans(t: int, blocks: int) -> list[tuple[int, int]]:
    return [(t * i // blocks, t * (i + 1) // blocks) for i in range(blocks)]


def _hidden(start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start, stop] bool: True where a key lies after its query."""
    query = torch.arange(start, stop, device=device)[:, None]
    return torch.arange(stop, device=device)[None, :] > query


def _scores(q: Tensor, k: Tensor, scale: float, start: int, starts: Tensor | None) -> Tensor:
    """Masked scores [B, K, G, rows, S] of query rows start.. against the first S keys, in float32 or wider."""
    b, kv, g, rows, h = q.shape
    s = k.shape[2]
    raw = torch.matmul(q.reshape(b, kv, g * rows, h), k.transpose(-1, -2)).reshape(b, kv, g, rows, s)
    hidden = _hidden(start, start + rows, q.device)
    if starts is not None:
        others = torch.arange(s, device=q.device) < starts[:, start : start + rows, None]
        hidden = (hidden | others)[:, None, None]
    return (upcast(raw) * scale).masked_fill(hidden, float("-inf"))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: int, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    kv = k.shape[2]
    qg, ks, vs = _grouped(q, kv), k.transpose(1, 2), v.transpose(1, 2)
    outs, lses = [], []
    for start, stop in _spans(q.shape[1], blocks):
        z = _scores(qg[..., start:stop, :], ks[:, :, :stop], scale, start, starts)
        top = z.amax(-1, keepdim=True)
        e = torch.exp(z - top)
        total = e.sum(-1, keepdim=True)
        p = (e / total).to(q.dtype)
        b, kv, g, rows, s = p.shape
        outs.append(torch.matmul(p.reshape(b, kv, g * rows, s), vs[:, :, :stop]).reshape(b, kv, g, rows, -1))
        lses.append((total.log() + top).squeeze(-1))
    lse = torch.cat(lses, -1) if blocks > 1 else lses[0]
    out = torch.cat(outs, -2) if blocks > 1 else outs[0]
    return _ungrouped(out), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    blocks: int,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kv = k.shape[2]
    qg, dog, ks, vs = _grouped(q, kv), _grouped(do, kv), k.transpose(1, 2), v.transpose(1, 2)
    delta = _grouped((upcast(do) * upcast(o)).sum(-1, keepdim=True), kv)  # [B, K, G, T, 1]
    lse = lse.reshape(*qg.shape[:-1], 1)
    dqs = []
    dk = torch.zeros_like(ks, dtype=lse.dtype, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(dk)
    for start, stop in reversed(_spans(q.shape[1], blocks)):
        span = (..., slice(start, stop), slice(None))
        qb, dob, kb, vb = qg[span], dog[span], ks[:, :, :stop], vs[:, :, :stop]
        b, _, g, rows, h = qb.shape
        flat = (b, kv, g * rows, -1)
        p = torch.exp(_scores(qb, kb, scale, start, starts) - lse[span])
        dp = torch.matmul(dob.reshape(flat), vb.transpose(-1, -2)).reshape(p.shape)
        ds = (p * (upcast(dp) - delta[span]) * scale).to(q.dtype).reshape(flat)
        p = p.to(q.dtype).reshape(flat)
        dqs.append(torch.matmul(ds, kb).reshape(b, kv, g, rows, h))
        grow = (0, 0, 0, dk.shape[2] - stop)
        dk = dk + torch.nn.functional.pad(upcast(torch.matmul(ds.transpose(-1, -2), qb.reshape(flat))), grow)
        dv = dv + torch.nn.functional.pad(upcast(torch.matmul(p.transpose(-1, -2), dob.reshape(flat))), grow)
    dq = torch.cat(dqs[::-1], -2) if blocks > 1 else dqs[0]
    return (
        _ungrouped(dq),
        dk.to(k.dtype).transpose(1, 2).contiguous(),
        dv.to(v.dtype).transpose(1, 2).contiguous(),
    )


def _blocks(t: int) -> int:
    return max(1, min(MAX_BLOCKS, t // MIN_BLOCK))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o [B, T, N, H] in q's dtype = softmax(scale q k^T + causal mask) v, and log-sum-exp [B, N, T] of the scores."""
    return _forward(q, k, v, scale, 1, starts)


def attention_bwd_reference(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of q, k, v; probabilities are computed again from lse."""
    return _backward(do, q, k, v, o, lse, scale, 1, starts)


def attention_blocked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As attention_reference, on a few blocks of queries against the keys they can see."""
    return _forward(q, k, v, scale, _blocks(q.shape[1]), starts)


def attention_bwd_blocked(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As attention_bwd_reference, block by block."""
    return _backward(do, q, k, v, o, lse, scale, _blocks(q.shape[1]), starts)


_MASK = 2048  # FlashAttentionScore's sparse mode 2 takes one mask of this size for causal attention of any length


def _mask(q: Tensor, starts: Tensor | None) -> dict[str, object]:
    """What FlashAttentionScore and its gradient are told about the mask: the compressed causal one, or, with documents,
    the whole of it, [B, 1, T, T]."""
    if starts is None:
        hidden = torch.ones((_MASK, _MASK), dtype=torch.bool, device=q.device).triu(1)
        return {"atten_mask": hidden, "sparse_mode": 2, "next_tockens": 0}
    at = torch.arange(q.shape[1], device=q.device)
    hidden = (at[:, None] < at[None, :]) | (at < starts[:, :, None])
    return {"atten_mask": hidden[:, None], "sparse_mode": 0}


def attention_npu(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FlashAttentionScore in the layout [B, N, S, D]. Its two statistics per row, each eight times over, become the one
    log-sum-exp that is kept for the backward."""
    heads_first, mask = [x.transpose(1, 2).contiguous() for x in (q, k, v)], _mask(q, starts)
    o, top, total, *_ = torch.ops.npu.npu_fusion_attention(*heads_first, q.shape[2], "BNSD", scale=scale, **mask)
    return o.transpose(1, 2).contiguous(), top[..., 0] + total[..., 0].log()


def attention_bwd_npu(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient computes exp(score - top) / total: with top = lse and total = 1 these are the probabilities."""
    query, key, value, dy, out = (x.transpose(1, 2).contiguous() for x in (q, k, v, do, o))
    top = lse[..., None].expand(*lse.shape, 8).contiguous()
    dq, dk, dv, *_ = torch.ops.npu.npu_fusion_attention_grad(
        query, key, value, dy, q.shape[2], "BNSD", softmax_max=top, softmax_sum=torch.ones_like(top), attention_in=out,
        scale_value=scale, **_mask(q, starts),
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv


def _abstract(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    b, t, n, _ = q.shape
    if n % k.shape[2]:
        raise ValueError(f"attention: {n} query heads are not a multiple of {k.shape[2]} kv heads")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((b, n, t), dtype=dtype)


def _flops(q: Tensor, k: Tensor, *_: Argument) -> int:
    """Two products over the causal half of the T x S square."""
    return 4 * q.numel() * k.shape[1] // 2


_OF_STARTS = ", b t"

attention_bwd = kernel(
    name="attention_bwd",
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, Tensor? starts=None) "
    "-> (Tensor, Tensor, Tensor)",
    reference=attention_bwd_reference,
    abstract=lambda do, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    factors=lambda do, q, k, v, o, lse, scale, starts=None: Factors(
        f"b t n h, b t n h, b s n h, b s n h, b t n h, b n t{_OF_STARTS if starts is not None else ''} "
        "-> b t n h, b s n h, b s n h",
        frozenset("tsh"),
    ),
    flops=lambda do, q, k, *_: 5 * _flops(q, k) // 2,
    impls={"blocked": attention_bwd_blocked},
    npu=attention_bwd_npu,
)

attention = kernel(
    name="attention",
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? starts=None) -> (Tensor, Tensor)",
    reference=attention_reference,
    abstract=_abstract,
    factors=lambda q, k, v, scale, starts=None: Factors(
        f"b t n h, b s n h, b s n h{_OF_STARTS if starts is not None else ''} -> b t n h, b n t", frozenset("tsh")
    ),
    flops=_flops,
    vjp=lambda inputs, outputs, cts: (
        *attention_bwd(cts[0], *inputs[:3], outputs[0], outputs[1], *inputs[3:]),
        *[None for _ in inputs[3:]],
    ),
    impls={"blocked": attention_blocked},
    npu=attention_npu,
)
