"""Each GE op of the interpreter alone, against our kernels' references and torch."""

from __future__ import annotations

import pytest
import torch
from ge_fused_ops import OPS
from ge_interpreter import COLLECTIVES

from kernels.registry import KERNELS
from sharding import Mesh, simulate

MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def flash(heads, scale):
    return {
        "input_layout": "BNSD", "sparse_mode": 2, "keep_prob": 1.0, "head_num": heads, "scale_value": scale,
    }  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flash_attention_score_and_its_gradient(kv_heads):
    q, k, v, do = (
        draw(2, 7, 4, 8),
        draw(2, 7, kv_heads, 8, seed=1),
        draw(2, 7, kv_heads, 8, seed=2),
        draw(2, 7, 4, 8, seed=3),
    )
    want, lse = KERNELS["attention"].reference(q, k, v, 0.3)
    first = [x.transpose(1, 2) for x in (q, k, v)]
    unfed = [None, None, None]
    top, total, _, out = OPS["FlashAttentionScore"](flash(4, 0.3), *first, *unfed, MASK)
    close(out.transpose(1, 2), want)
    close(top[..., 0] + total[..., 0].log(), lse)
    grads = OPS["FlashAttentionScoreGrad"](
        flash(4, 0.3), *first, do.transpose(1, 2), *unfed, MASK, top, total, None, out
    )
    for got, expected in zip(grads, KERNELS["attention_bwd"].reference(do, q, k, v, want, lse, 0.3), strict=False):
        close(got.transpose(1, 2), expected)


def test_rms_norm_and_its_gradient():
    x, w, dy = draw(2, 3, 8), draw(8, seed=1), draw(2, 3, 8, seed=2)
    want, rstd = KERNELS["rms_norm"].reference(x, w, 1e-5)
    got, got_rstd = OPS["RmsNorm"]({"epsilon": 1e-5}, x, w)
    close(got, want)
    close(got_rstd, rstd)
    for a, b in zip(
        OPS["RmsNormGrad"]({}, dy, x, rstd, w), KERNELS["rms_norm_bwd"].reference(dy, x, w, rstd), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("inverse", [False, True])
def test_rotary_mul(inverse):
    x = draw(2, 5, 3, 8)
    cos, sin = KERNELS["rope_table"].reference(x, 5, 8, 10000.0)
    r1, r2 = (torch.cat([t, t], -1)[None, :, None] for t in (cos, -sin if inverse else sin))
    close(OPS["RotaryMul"]({}, x, r1, r2), KERNELS["rope"].reference(x, cos, sin, inverse))


def test_swiglu_and_its_gradient():
    gate, up, dy = draw(2, 3, 6), draw(2, 3, 6, seed=1), draw(2, 3, 6, seed=2)
    both = torch.cat([gate, up], -1)
    close(OPS["SwiGlu"]({"dim": -1}, both), KERNELS["swiglu"].reference(gate, up))
    close(OPS["SwiGluGrad"]({"dim": -1}, dy, both), torch.cat(KERNELS["swiglu_bwd"].reference(dy, gate, up), -1))


def test_embedding_and_its_gradient():
    table, ids, dy = draw(11, 4), torch.tensor([[1, 3, 1], [10, 0, 1]]), draw(2, 3, 4, seed=1)
    close(OPS["GatherV2"]({}, table, ids, torch.tensor([0])), KERNELS["embedding"].reference(table, ids))
    close(OPS["EmbeddingDenseGrad"]({"num_weights": 11}, dy, ids), KERNELS["embedding_bwd"].reference(dy, ids, table))


@pytest.mark.parametrize("turn_a", [False, True])
@pytest.mark.parametrize("turn_b", [False, True])
def test_mat_mul(turn_a, turn_b):
    a, b = draw(*((3, 5), (5, 3))[turn_a]), draw(*((3, 4), (4, 3))[turn_b], seed=1)
    a, b = (draw(5, 3) if not turn_a else draw(3, 5)), b
    got = OPS["MatMul"]({"transpose_x1": turn_a, "transpose_x2": turn_b}, a, b)
    close(got, KERNELS["matmul"].reference(a, b, turn_a, turn_b))


def test_cross_entropy_is_made_of_these():
    z, axes = draw(2, 3, 9), torch.tensor([-1])
    top = OPS["ReduceMax"]({"keep_dims": True}, z, axes)
    lse = OPS["Add"]({}, OPS["ReduceLogSumExp"]({"keep_dims": False}, z - top, axes), top.squeeze(-1))
    ids = torch.tensor([[1, 8, 0], [4, 4, 2]])
    hit = OPS["GatherElements"]({"dim": -1}, z, ids[..., None]).squeeze(-1)
    nll, want = KERNELS["cross_entropy"].reference(z, ids)
    close(lse, want)
    close(lse - hit, nll)


def test_shapes_slices_and_small_ops():
    x = draw(4, 6)
    i = torch.tensor
    close(OPS["SplitV"]({}, x, i([2, -1]), i(1))[1], x[:, 2:])
    close(OPS["StridedSliceV2"]({}, x, i([1]), i([5]), i([1]), i([2])), x[:, 1:5:2])
    close(OPS["StridedSlice"](
        {"begin_mask": 1, "end_mask": 1, "shrink_axis_mask": 2}, x, i([9, -1]), i([0, 0]), i([1, 1])), x[:, -1]
    )  # fmt: skip
    close(OPS["Slice"]({}, x, i([1, 0]), i([2, -1])), x[1:3])
    close(OPS["PadV3"]({}, x, i([0, 1, 2, 0])), torch.nn.functional.pad(x, [2, 0, 0, 1]))
    close(OPS["Unpack"]({"axis": 0}, x)[3], x[3])
    close(OPS["Unsqueeze"]({"axes": [0, 2]}, x), x[None, :, None])
    close(OPS["ConcatV2"]({}, x, x, i(1)), torch.cat([x, x], 1))
    close(OPS["Sxpy"]({}, i(1.0), x, i(2.0)), 1 - 2 * x)
    close(OPS["ClipByValueV2"]({}, x, i(-0.1), i(0.2)), x.clamp(-0.1, 0.2))
    close(OPS["MaskedFill"]({}, x, x > 0, i(0.0)), x.masked_fill(x > 0, 0))
    assert OPS["Cast"]({"dst_type": 27}, x).dtype == torch.bfloat16
    assert torch.equal(OPS["Bitcast"]({"type": 6}, x.bfloat16()), x.bfloat16().view(torch.int16))
    assert OPS["Range"]({}, i(0), i(5), i(2)).tolist() == [0, 2, 4]


@pytest.mark.parametrize("n", [2, 4])
def test_collectives_equal_the_simulated_ones(n):
    mesh, xs = Mesh((("a", n),)), [draw(4 * n, 3, seed=i) for i in range(n)]
    ws = [draw(3, 5, seed=9 + i) for i in range(n)]
    total = {"reduction": "sum", "reduce_op": "sum"}
    turned = {"is_trans_a": False, "is_trans_b": True, **total}
    plain = {**turned, "is_trans_b": False}
    none, ours = [None] * n, {**simulate.COLLECTIVES, **simulate.FUSED}
    for kind, args, name, rest in (
        ("HcomAllGather", ({}, xs), "all_gather", ("a", n, 0)),
        ("HcomReduceScatter", (total, xs), "reduce_scatter", ("a", n, 0)),
        ("HcomAllReduce", (total, xs), "all_reduce", ("a", n, "sum")),
        ("HcomAllReduce", ({"reduction": "max"}, xs), "all_reduce", ("a", n, "max")),
        ("HcomAllToAll", ({}, xs), "all_to_all", ("a", n, 0, 0)),
        ("AllGatherMatmul", (plain, xs, ws, none), "all_gather_matmul", (ws, "a", n, False)),
        ("AllGatherMatmul", (turned, xs, [w.t() for w in ws], none), "all_gather_matmul", (ws, "a", n, False)),
        ("MatmulReduceScatter", (plain, xs, ws, none), "matmul_reduce_scatter", (ws, "a", n, False)),
    ):
        for got, want in zip(COLLECTIVES[kind](*args), ours[name](mesh, xs, *rest), strict=True):
            for a, b in zip(
                got if isinstance(got, tuple) else [got], want if isinstance(want, list) else [want], strict=True
            ):
                close(a, b)
