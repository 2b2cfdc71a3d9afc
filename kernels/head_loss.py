"""Head, cross-entropy and the gradients of both in one op: each block of tokens goes forward and backward at once.

No traced function calls it. A pass puts it where a graph computes a loss and its backward, and the cotangent of the
loss is known before the loss (llama_fn/compiler/passes/join_loss.py). After Hsu et al. 2024, Liger Kernel, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from kernels.cross_entropy import cross_entropy_bwd_reference, cross_entropy_reference, per_token
from kernels.einsum import einsum_npu, einsum_reference
from kernels.head_cross_entropy import (
    DHEAD,
    DX,
    LOGITS,
    Product,
    added,
    block_size,
    logits_bytes,
    token_blocks,
)
from kernels.registry import Factors, kernel
from kernels.rms_norm import upcast

# The gradient of a head [V, D] in float32 is 4 V D bytes and a pass over memory for each further block. With so many
# tokens times D in a block, its logits in 16 bits take twice that, and its products cost far more than the pass.
TOKENS_PER_WIDTH = 4
_CACHED = 1 << 18  # logits that stay in a CPU's cache from one pass over them to the next: 1 MB in float32

_Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Form(NamedTuple):
    """How the parts of a block are computed: `product` as an einsum's form does; `backward` of (g, logits, targets) to
    nll and dlogits; `add` a block's (dlogits, rows of x) to the gradient of the head, which the first of them begins.
    """

    product: Product
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    add: Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor]


def head_loss_reference(
    g: torch.Tensor, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, tokens: int,
    product: Product = einsum_reference,
) -> _Tensors:  # fmt: skip
    """nll [B, T] of cross_entropy of logits = x head^T, and with its cotangent g [B, T] dx [B, T, D] and dhead [V, D].

    `tokens`: of a block. dhead is summed over blocks in float32 or wider and rounded once.
    """

    def backward(g: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nll, lse = cross_entropy_reference(logits, targets)
        return nll, cross_entropy_bwd_reference(g, logits, targets, lse)

    def add(total: torch.Tensor | None, dlogits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return added(total, product(DHEAD, dlogits, rows))

    return _by_blocks(_Form(product, backward, add), g, x, head, targets, tokens)


def head_loss_in_place_reference(
    g: torch.Tensor, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, tokens: int
) -> _Tensors:
    """The same with a block's dlogits in the memory of its logits, a few rows at a time, and one sum for dhead."""

    def backward(g: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nll, few = torch.empty_like(upcast(g)), max(1, _CACHED // logits.shape[1])
        for start in range(0, len(logits), few):
            rows = slice(start, start + few)
            hit = targets[rows, None]
            p = torch.log_softmax(upcast(logits[rows]), 1)
            nll[rows] = -p.gather(1, hit).squeeze(1)
            p.exp_().scatter_add_(1, hit, p.new_full((), -1).expand_as(hit))
            torch.mul(p, g[rows, None], out=logits[rows])
        return nll, logits

    def add(total: torch.Tensor | None, dlogits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if total is None:
            return upcast(dlogits.t() @ rows)
        if total.dtype == rows.dtype:
            return total.addmm_(dlogits.t(), rows)
        return total.add_(dlogits.t() @ rows)

    return _by_blocks(_Form(einsum_reference, backward, add), g, x, head, targets, tokens)


def _by_blocks(
    form: _Form, g: torch.Tensor, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, tokens: int
) -> _Tensors:
    nll, dx, dhead = list[torch.Tensor](), list[torch.Tensor](), None
    for rows, t, of_loss in token_blocks(x, targets, g, size=tokens):
        part, dlogits = form.backward(of_loss, form.product(LOGITS, rows, head), t)
        nll.append(part)
        dx.append(form.product(DX, dlogits, head))
        dhead = form.add(dhead, dlogits, rows)
    assert dhead is not None, "no tokens"
    return torch.cat(nll).reshape(targets.shape), torch.cat(dx).reshape(x.shape), dhead.to(head.dtype)


def _abstract(g: torch.Tensor, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, tokens: int) -> _Tensors:
    return per_token(x, tuple(targets.shape))[0], torch.empty_like(x), torch.empty_like(head)


def _flops(g: torch.Tensor, x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, tokens: int) -> int:
    return 6 * x.numel() * head.shape[0]


_SCHEMA = "(Tensor g, Tensor x, Tensor head, Tensor targets, int tokens) -> (Tensor, Tensor, Tensor)"
_FACTORS = Factors("b t, b t d, v d, b t -> b t, b t d, v d", frozenset("vd"))

head_loss_in_place = kernel(
    name="head_loss_in_place",
    schema=_SCHEMA,
    reference=head_loss_in_place_reference,
    abstract=_abstract,
    factors=lambda *_: _FACTORS,
    flops=_flops,
    scratch=lambda g, x, head, targets, tokens: logits_bytes(x, head, tokens),
    opaque=True,  # compilers would give dlogits memory of their own
)

head_loss = kernel(
    name="head_loss",
    schema=_SCHEMA,
    reference=head_loss_reference,
    npu=partial(head_loss_reference, product=einsum_npu),
    abstract=_abstract,
    factors=lambda *_: _FACTORS,
    flops=_flops,
    scratch=lambda g, x, head, targets, tokens: 2 * logits_bytes(x, head, tokens),  # and their gradient's
    # In place a further block costs little, so that the least memory can be had.
    impls={"in_place": lambda *args: head_loss_in_place(*args[:4], min(args[4], block_size(args[3])))},
)
