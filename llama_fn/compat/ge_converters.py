"""Our converters from torch operators to Ascend GE ops, where torchair has none or one that does not fit.

Registered with torchair's public `register_fx_node_ge_converter`; importing this needs torch_npu. Arguments are those
of the operator's schema, tensors being torchair's GE tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torchair
from torchair._ge_concrete_graph import ge_apis as ge
from torchair._ge_concrete_graph.compat_ir import ge_op
from torchair._ge_concrete_graph.ge_converter import custom  # noqa: F401  (loaded late, it would replace ours)
from torchair._ge_concrete_graph.hcom_utils import get_group_name_and_record
from torchair.ge import attr
from torchair.ge._ge_graph import ControlTensor, DataType, get_default_ge_graph, torch_type_to_ge_type


@torchair.register_fx_node_ge_converter(torch.ops.llama_fn.matmul.default)
def matmul(a: Any, b: Any, turn_a: bool, turn_b: bool, meta_outputs: Any = None) -> Any:
    """MatMul and BatchMatMul read transposed operands themselves, where aten's mm would need a Transpose before it."""
    if a.rank == 2:
        return ge.MatMul(a, b, None, transpose_x1=turn_a, transpose_x2=turn_b)
    return ge.BatchMatMul(a, b, adj_x1=turn_a, adj_x2=turn_b)


@torchair.register_fx_node_ge_converter(torch.ops.llama_fn.barrier.default)
def barrier(x: Any, after: Any, meta_outputs: Any = None) -> Any:
    """Identity with a control edge, which GE keeps, and by which its merging of equal ops tells two readers apart."""
    return ge.Identity(x, dependencies=[after])


@torchair.register_fx_node_ge_converter(torch.ops.npu.npu_fusion_attention_grad.default)
def npu_fusion_attention_grad(
    query: Any, key: Any, value: Any, dy: Any, head_num: int, input_layout: str, *, atten_mask: Any = None,
    softmax_max: Any = None, softmax_sum: Any = None, attention_in: Any = None, scale_value: float = 1.0,
    next_tockens: int = 2147483647, sparse_mode: int = 0, meta_outputs: Any = None,
) -> list[Any]:  # fmt: skip
    """FlashAttentionScoreGrad without dropout or bias. torchair's own converter returns four results where the operator
    declares five, and then refuses itself."""
    dq, dk, dv, unused = ge.FlashAttentionScoreGrad(
        query, key, value, dy, pse_shift=None, drop_mask=None, padding_mask=None, atten_mask=atten_mask,
        softmax_max=softmax_max, softmax_sum=softmax_sum, softmax_in=None, attention_in=attention_in, prefix=None,
        actual_seq_qlen=None, actual_seq_kvlen=None, q_start_idx=None, kv_start_idx=None, head_num=head_num,
        input_layout=input_layout, scale_value=scale_value, keep_prob=1.0, pre_tockens=2147483647,
        next_tockens=next_tockens, inner_precise=0, sparse_mode=sparse_mode,
    )  # fmt: skip
    return [dq, dk, dv, *[unused] * (len(meta_outputs) - 3)]


def hcom_name(group_name: str) -> str:
    """What HCCL calls a process group, noted on the GE graph with its ranks."""
    distributed = torch.distributed.distributed_c10d
    group = distributed._resolve_process_group(group_name)  # type: ignore[arg-type]
    ranks = torch.distributed.get_process_group_ranks(group)
    return str(get_group_name_and_record(distributed._get_group_tag(group), ranks, len(ranks)))


def _bits(x: Any, kind: int) -> Any:
    """The same bits as another dtype. (torchair's own Bitcast asks CANN for the op's definition.)"""
    return ge_op("Bitcast", inputs={"x": x}, outputs=["y"], attrs={"type": attr.DataType(kind)})


@torchair.register_fx_node_ge_converter(torch.ops.llama_fn.send.default)
def send(x: Any, group_name: str, n: int, target: int, tag: int, meta_outputs: Any = None) -> Any:
    """HcomSend; `group_name` of the direction, and the other's number in it, stand where our op has axes and step."""
    # No definition of HcomSend and HcomReceive up to CANN 9.0 lists bf16, and a message only moves bits.
    sent = _bits(x, DataType.DT_INT16) if x.dtype == DataType.DT_BF16 else x
    ge.HcomSend(sent, group=hcom_name(group_name), sr_tag=tag, dest_rank=target)
    get_default_ge_graph().dont_prune_me(ControlTensor(get_default_ge_graph().op[-1]))  # though nobody reads it
    return ge.Const([0.0], dtype=DataType.DT_FLOAT)  # our op's result, which nobody reads


@torchair.register_fx_node_ge_converter(torch.ops.llama_fn.receive.default)
def receive(
    shape: list[int], dtype: torch.dtype, group_name: str, n: int, source: int, tag: int, *, device: torch.device,
    meta_outputs: Any = None,
) -> Any:  # fmt: skip
    """HcomReceive, as :func:`send`."""
    kind = DataType.DT_INT16 if dtype == torch.bfloat16 else torch_type_to_ge_type(dtype)
    got = ge.HcomReceive(group=hcom_name(group_name), sr_tag=tag, src_rank=source, shape=shape, dtype=kind)
    get_default_ge_graph().dont_prune_me(ControlTensor(got.node))
    return got


@torchair.register_fx_node_ge_converter(torch.ops.llama_fn.received.default)
def received(pending: Any, axes: str, n: int, step: int, tag: int, meta_outputs: Any = None) -> Any:
    """GE waits by itself where a value is read: here, so that bits are bf16 again no sooner."""
    return _bits(pending, DataType.DT_BF16) if meta_outputs.dtype == DataType.DT_BF16 else ge.Identity(pending)


@torchair.register_fx_node_ge_converter(torch.ops._c10d_functional.all_to_all_single.default)
def all_to_all_single(
    x: Any, output_split_sizes: list[int], input_split_sizes: list[int], group_name: str, meta_outputs: Any = None
) -> Any:
    """HcomAllToAll of equal parts, which is all that we exchange. torchair has this one as a decomposition for graphs
    that AOTAutograd traces, and ours are not."""
    assert len({*output_split_sizes, *input_split_sizes}) == 1
    return ge.HcomAllToAll(x, group=hcom_name(group_name))


@torchair.register_fx_node_ge_converter(torch.ops.llama_fn.all_gather_matmul.default)
def all_gather_matmul(a: Any, b: Any, group_name: str, n: int, transposed: bool, meta_outputs: Any = None) -> Any:
    """y and the gathered rows."""
    return ge.AllGatherMatmul(
        a, b, bias=None, group=hcom_name(group_name), gather_index=0, is_trans_a=False, is_trans_b=transposed,
        comm_turn=0, rank_size=n, is_gather_out=True,
    )  # fmt: skip


@torchair.register_fx_node_ge_converter(torch.ops.llama_fn.matmul_reduce_scatter.default)
def matmul_reduce_scatter(a: Any, b: Any, group_name: str, n: int, transposed: bool, meta_outputs: Any = None) -> Any:
    """llama_fn.matmul_reduce_scatter as GE's MatmulReduceScatter."""
    return ge.MatmulReduceScatter(
        a, b, bias=None, group=hcom_name(group_name), reduce_op="sum", is_trans_a=False, is_trans_b=transposed,
        comm_turn=0, rank_size=n,
    )  # fmt: skip
