"""Ascend GE ops on the CPU, each written from its public definition (REG_OP and the operator's page in CANN's manual).

`OPS[type](attrs, *inputs)`: inputs in the op's order, None for an optional one that is not fed; one tensor or several.
Narrow floats are computed in float32 and rounded once, as the vector and cube units do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# ge::DataType, the numbers that attributes such as Cast's dst_type hold
DTYPES = {
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16, 9: torch.int64,
    11: torch.float64, 12: torch.bool, 27: torch.bfloat16,
}  # fmt: skip
OPS: dict[str, Callable[..., Any]] = {}


def op(fn: Callable[..., Any]) -> Callable[..., Any]:
    OPS[fn.__name__] = fn
    return fn


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def ints(x: torch.Tensor) -> list[int]:
    return [int(i) for i in x.reshape(-1).tolist()]


def _pointwise(name: str, fn: Callable[..., torch.Tensor]) -> None:
    OPS[name] = lambda attrs, *xs: fn(*xs)


for _name, _fn in {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "RealDiv": torch.div, "Pow": torch.pow, "Neg": torch.neg,
    "Sqrt": torch.sqrt, "Exp": torch.exp, "Log": torch.log, "Cos": torch.cos, "Sin": torch.sin, "Abs": torch.abs,
    "Reciprocal": torch.reciprocal, "Rsqrt": torch.rsqrt, "Maximum": torch.maximum, "Minimum": torch.minimum,
    "Equal": torch.eq, "Less": torch.lt, "Greater": torch.gt, "GreaterEqual": torch.ge, "LessEqual": torch.le,
    "LogicalAnd": torch.logical_and, "LogicalNot": torch.logical_not, "OnesLike": torch.ones_like,
    "ZerosLike": torch.zeros_like, "SelectV2": torch.where, "Square": torch.square,
}.items():  # fmt: skip
    _pointwise(_name, _fn)


@op
def Identity(attrs, x):
    return x.clone()


@op
def Sxpy(attrs, x1, x2, alpha):
    """x1 - alpha x2."""
    return x1 - alpha * x2


@op
def Axpy(attrs, x1, x2):
    return x1 + attrs["alpha"] * x2


@op
def Cast(attrs, x):
    return x.to(DTYPES[attrs["dst_type"]])


@op
def ClipByValueV2(attrs, x, low, high):
    return torch.minimum(torch.maximum(x, low), high)


@op
def MaskedFill(attrs, x, mask, value):
    return torch.where(mask, value.to(x.dtype), x)


@op
def Reshape(attrs, x, shape):
    return x.reshape(ints(shape))


@op
def Squeeze(attrs, x):
    return x.squeeze(attrs["axis"])


@op
def Unsqueeze(attrs, x):
    for axis in sorted(attrs["axes"]):
        x = x.unsqueeze(axis)
    return x


@op
def Transpose(attrs, x, perm):
    return x.permute(ints(perm)).contiguous()


@op
def BroadcastTo(attrs, x, shape):
    return x.expand(ints(shape)).contiguous()


@op
def Fill(attrs, dims, value):
    return torch.full(ints(dims), value.item(), dtype=value.dtype)


@op
def Range(attrs, start, limit, delta):
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@op
def Triu(attrs, x):
    return x.triu(attrs["diagonal"] or 0)


@op
def Pack(attrs, *xs):
    return torch.stack(xs, attrs["axis"] or 0)


@op
def Unpack(attrs, x):
    return x.unbind(attrs["axis"] or 0)


@op
def ConcatV2(attrs, *xs):
    return torch.cat(xs[:-1], int(xs[-1]))


@op
def SplitV(attrs, x, sizes, dim):
    """One size may be -1: what is left."""
    widths = ints(sizes)
    left = x.shape[int(dim)] - sum(w for w in widths if w >= 0)
    return [part.contiguous() for part in x.split([left if w < 0 else w for w in widths], int(dim))]


@op
def Slice(attrs, x, offsets, sizes):
    for dim, (start, size) in enumerate(zip(ints(offsets), ints(sizes), strict=True)):
        x = x.narrow(dim, start, x.shape[dim] - start if size == -1 else size)
    return x.contiguous()


@op
def StridedSliceV2(attrs, x, begin, end, axes, strides):
    for axis, b, e, s in zip(ints(axes), ints(begin), ints(end), ints(strides), strict=True):
        x = x[(*[slice(None)] * axis, slice(b, e, s))]
    return x.contiguous()


@op
def StridedSlice(attrs, x, begin, end, strides):
    kept, dropped = [], []
    for dim, (b, e, s) in enumerate(zip(ints(begin), ints(end), ints(strides), strict=True)):
        b = None if attrs["begin_mask"] >> dim & 1 else b
        if attrs["shrink_axis_mask"] >> dim & 1:
            kept.append(slice(b, None if b == -1 else b + 1))
            dropped.append(dim)
        else:
            kept.append(slice(b, None if attrs["end_mask"] >> dim & 1 else e, s))
    x = x[tuple(kept)]
    return (x.squeeze(dropped) if dropped else x).contiguous()


@op
def PadV3(attrs, x, paddings, value=None):
    pairs = ints(paddings)
    order = [p for dim in reversed(range(x.dim())) for p in pairs[2 * dim : 2 * dim + 2]]
    return torch.nn.functional.pad(x, order, value=0.0 if value is None else value.item())


@op
def ReduceSum(attrs, x, axes):
    return wide(x).sum(ints(axes), keepdim=bool(attrs["keep_dims"])).to(x.dtype) if axes.numel() else x


@op
def ReduceMax(attrs, x, axes):
    return x.amax(ints(axes), keepdim=bool(attrs["keep_dims"]))


@op
def ReduceLogSumExp(attrs, x, axes):
    return x.logsumexp(ints(axes), keepdim=bool(attrs["keep_dims"]))


@op
def GatherV2(attrs, x, indices, axis):
    return torch.index_select(x, int(axis), indices.reshape(-1).long()).reshape(
        *x.shape[: int(axis)], *indices.shape, *x.shape[int(axis) + 1 :]
    )


@op
def GatherElements(attrs, x, index):
    return x.gather(attrs["dim"], index)


@op
def EmbeddingDenseGrad(attrs, grad, indices):
    out = torch.zeros(attrs["num_weights"], grad.shape[-1], dtype=wide(grad).dtype)
    return out.index_add_(0, indices.reshape(-1).long(), wide(grad).reshape(-1, grad.shape[-1])).to(grad.dtype)


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
    """Scaled scores [B, N, S, S] in float32, masked; layout BNSD, sparse mode 2: the causal mask comes compressed."""
    assert attrs["input_layout"] == "BNSD" and attrs["sparse_mode"] == 2 and attrs["keep_prob"] == 1.0
    assert mask.shape == (2048, 2048) and torch.equal(mask.bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    assert attrs["head_num"] == query.shape[1]
    t, s = query.shape[2], key.shape[2]
    hidden = torch.arange(s)[None] > torch.arange(t)[:, None]
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
