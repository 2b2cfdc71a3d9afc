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
    "LogicalAnd": torch.logical_and, "LogicalNot": torch.logical_not, "LogicalOr": torch.logical_or,
    "OnesLike": torch.ones_like,
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
def Bitcast(attrs, x):
    return x.view(DTYPES[attrs["type"]])


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
