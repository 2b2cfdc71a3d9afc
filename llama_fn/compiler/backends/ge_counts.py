"""What ops the GE graphs of a step have, counted without torch_npu from the operators that torchair is given.

Each operator becomes the GE ops that torchair's converter for it makes. Ops that GE carries out while it compiles, and
that leave no work for the device, are not counted: constants, inputs, reshapes. tests/npu/test_budget.py compares with
the graphs that the real torchair makes.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.registry import KERNELS, tensor_bytes
from kernels.scope_names import without_numbers
from llama_fn import compat
from llama_fn.ascend.budget import Budget, GraphCounts
from llama_fn.compiler import calls, ir, passes
from llama_fn.compiler.backends.npu_graphs import npu_graphs
from llama_fn.compiler.passes.bucket import joinable
from llama_fn.compiler.passes.constants import SCOPE
from llama_fn.compiler.pieces import in_pieces
from sharding import collectives_table
from sharding.messages import over_stages, receive, send, stream_of

# Carried out by GE's local engine (hicann/ge, compiler/engines/local_engine/ops_kernel_store), or inputs and results.
NO_WORK = frozenset({
    "Bitcast", "Const", "Data", "ExpandDims", "Identity", "NetOutput", "RefData", "Reshape", "Squeeze", "Unsqueeze",
})  # fmt: skip
_HCOM = {
    "all_gather": "HcomAllGather", "all_reduce": "HcomAllReduce", "reduce_scatter": "HcomReduceScatter",
    "all_to_all": "HcomAllToAll",
}  # fmt: skip
_WIDE = {
    "aten.cat.default": lambda node: node.args[0], "aten.stack.default": lambda node: node.args[0],
    "aten.split.Tensor": compat.node_value, "aten.unbind.int": compat.node_value,
}  # fmt: skip
_TURNS = (torch.ops.aten.transpose.int, torch.ops.aten.permute.default)
_ATEN = {
    "_to_copy.default": "Cast", "_unsafe_view.default": "", "add.Tensor": "Add", "arange.default": "Cast Range",
    "arange.start_step": "Cast Range", "bitwise_and.Tensor": "LogicalAnd",
    "bitwise_or.Tensor": "LogicalOr", "cat.default": "ConcatV2",
    "clamp.default": "ClipByValueV2", "copy_.default": "", "cos.default": "Cos", "div.Tensor": "RealDiv",
    "embedding.default": "GatherV2", "embedding_dense_backward.default": "EmbeddingDenseGrad", "eq.Scalar": "Equal",
    "eq.Tensor": "Equal", "exp.default": "Exp", "expand.default": "BroadcastTo", "gather.default": "GatherElements",
    "ge.Scalar": "GreaterEqual", "ge.Tensor": "GreaterEqual", "index_select.default": "GatherV2", "log.default": "Log",
    "logsumexp.default": "Abs Add Equal MaskedFill ReduceLogSumExp ReduceMax Sub", "lt.Scalar": "Cast Less",
    "lt.Tensor": "Less", "mul.Tensor": "Cast Mul", "neg.default": "Neg", "ones.default": "Fill",
    "ones_like.default": "OnesLike", "permute.default": "", "pow.Scalar": "Pow", "pow.Tensor_Scalar": "Pow",
    "reciprocal.default": "Reciprocal", "reshape.default": "", "rsub.Scalar": "Sxpy", "select.int": "GatherV2",
    "sin.default": "Sin", "slice.Tensor": "StridedSliceV2", "split.Tensor": "Cast Pack SplitV",
    "sqrt.default": "Sqrt", "squeeze.dim": "", "stack.default": "Pack", "sub.Tensor": "Sub",
    "sum.default": "Cast ReduceSum",
    "sum.dim_IntList": "ReduceSum", "transpose.int": "", "triu.default": "Triu", "unbind.int": "Unpack",
    "unsqueeze.default": "", "view.default": "", "where.self": "SelectV2", "zeros_like.default": "ZerosLike",
}  # fmt: skip
_C10D = {
    "all_gather_into_tensor.default": "HcomAllGather", "all_reduce.default": "HcomAllReduce",
    "all_to_all_single.default": "HcomAllToAll", "reduce_scatter_tensor.default": "HcomReduceScatter",
    "wait_tensor.default": "",
}  # fmt: skip
_NPU = {
    "npu_fusion_attention.default": "FlashAttentionScore",
    "npu_fusion_attention_grad.default": "FlashAttentionScoreGrad", "npu_rms_norm.default": "RmsNorm",
    "npu_rms_norm_backward.default": "RmsNormGrad", "npu_rotary_mul.default": "RotaryMul",
    "npu_swiglu.default": "SwiGlu", "npu_swiglu_backward.default": "SwiGluGrad",
}  # fmt: skip
_OURS = {
    "all_gather_matmul.default": "AllGatherMatmul", "barrier.default": "", "matmul.default": "MatMul",
    "matmul_reduce_scatter.default": "MatmulReduceScatter", "receive.default": "HcomReceive", "received.default": "",
    "send.default": "HcomSend",
}  # fmt: skip
# By operator, the GE ops that its converter makes; an empty text is none that leaves work.
CONVERTED: Mapping[str, tuple[str, ...]] = {
    f"{namespace}.{name}": tuple(kinds.split())
    for namespace, ops in (("aten", _ATEN), ("_c10d_functional", _C10D), ("npu", _NPU), ("llama_fn", _OURS))
    for name, kinds in ops.items()
}


def ge_ops(node: torch.fx.Node) -> tuple[str, ...]:
    """The GE ops, in any order, that an operator becomes; one of its own name where that is not known."""
    name = str(node.target)
    if over_stages(node):  # in no piece, and so in no form but ours
        return tuple(filter(None, [_HCOM.get(collectives_table.kind_of(node))]))
    source: Any = node.args[0] if node.args else None
    if name == "aten.clone.default":  # what splits and expands is contiguous in GE, what turns is not
        turned = source.target in _TURNS and not compat.node_value(source).is_contiguous()
        return ("Transpose",) if turned else ()
    if name == "aten.full.default":
        return ("Fill",) if node.args[0] else ()
    if name == "aten.sum.dim_IntList":  # torchair casts here only where it must, in sum.default always
        cast = compat.node_value(source).dtype != compat.node_value(node).dtype
        return ("Cast",) * cast + CONVERTED[name]
    return () if node.target is operator.getitem else CONVERTED.get(name, (name,))


@dataclass(frozen=True)
class Pieces:
    """What stands in the GE graphs of a device in form calls, and `between` them: what stages do together. `constants`
    of each: their GE ops and bytes, by what they are, as one graph has those of all once."""

    each: tuple[GraphCounts, ...]
    between: GraphCounts
    constants: tuple[Mapping[str, tuple[tuple[str, ...], int]], ...]

    def in_form(self, form: str) -> Budget:
        """The graphs of a form. Of a step that calls bodies, written out, the ops are a bound: what bodies are given,
        such as angles, they turn at every call, and one graph once."""
        if form == "calls":
            return Budget(form, self.each)
        once = {key: made for constants in self.constants for key, made in constants.items()}
        wide = tuple(sorted(n for piece in self.each for n in piece.wide * piece.runs))
        whole = GraphCounts("", 1, Counter(), Counter(), wide, sum(size for _, size in once.values()))
        for piece in (*self.each, self.between):
            for mine, its in ((whole.ops, piece.ops), (whole.collectives, piece.collectives)):
                for kind, n in its.items():
                    mine[kind] += n * piece.runs
        for piece, constants in zip(self.each, self.constants, strict=True):
            for kinds, _ in constants.values():
                whole.ops.subtract({kind: n * piece.runs for kind, n in Counter(kinds).items()})
        whole.ops.update(kind for kinds, _ in once.values() for kind in kinds)
        return Budget(form, (whole,), exact=len(self.each) == 1)

    def bucketed(self) -> Pieces:
        """With small collectives joined; an op that joins takes the place of each that goes."""
        each = tuple(replace(piece, collectives=piece.collectives - piece.joinable) for piece in self.each)
        return replace(self, each=each)

    def halved(self) -> Pieces:
        """With half as many microbatches, of twice the size: further runs of one piece are half as many."""
        each = tuple(replace(piece, runs=math.ceil(piece.runs / 2)) for piece in self.each)
        return replace(self, each=each)


def counted(gm: torch.fx.GraphModule) -> Pieces:
    """Of one device, from its lowered graph. A step that calls nothing is one piece."""
    compat.define_npu_ops()
    root = passes.copy_graph(gm)
    if not calls.bodies(root):
        fewer = joinable(root.graph)
        (alone,) = npu_graphs(root, _collective_forms(), "cpu").values()
        each = replace(of_graph(alone.gm, "", 1), joinable=fewer)
        return Pieces((each,), GraphCounts("", 1, Counter()), (_constants(alone.gm),))
    root = in_pieces(root)
    names, runs = ir.subgraphs(root), Counter(calls.body_of(root, n) for n in ir.calls(root.graph) if calls.is_call(n))
    fewer_of = {body: joinable(body.graph) for body in runs}
    made = npu_graphs(root, _collective_forms(), "cpu")
    pieces = tuple(
        replace(of_graph(graph.gm, names[body], runs[body]), joinable=fewer_of[body]) for body, graph in made.items()
    )
    return Pieces(pieces, of_graph(root, "", 1), tuple(_constants(graph.gm) for graph in made.values()))


def _constants(gm: torch.fx.GraphModule) -> dict[str, tuple[tuple[str, ...], int]]:
    """The GE ops of what depends on no input, and its bytes where other ops read it, by operator and operands
    (passes/constants.py puts them into a scope)."""
    keys: dict[torch.fx.Node, str] = {}
    for node in ir.calls(gm.graph):
        if ir.scope_of(node) == SCOPE:
            keys[node] = (
                f"{node.target}{torch.fx.node.map_arg((node.args, node.kwargs), lambda n: keys.get(n, n.name))}"
            )
    read = {node for node in keys if any(user not in keys for user in node.users)}
    return {
        key: (ge_ops(node), tensor_bytes(compat.node_value(node)) if node in read else 0) for node, key in keys.items()
    }


def of_graph(gm: torch.fx.GraphModule, name: str, runs: int) -> GraphCounts:
    """Of a graph as npu_graphs makes it: the ops that are no calls, nor pack what calls take."""
    computed = sum(size for _, size in _constants(gm).values())
    counts = GraphCounts(name, runs, Counter(), Counter(), _wide(gm.graph), computed)
    for node in ir.calls(gm.graph):
        if calls.is_call(node) or calls.is_packing(node):
            continue
        for kind in ge_ops(node):
            counts.ops[kind] += 1
            if kind.startswith("Hcom"):
                counts.collectives[_stream(node)] += 1
    return counts


def _wide(graph: torch.fx.Graph) -> tuple[int, ...]:
    """How many tensors each op joins or divides that stands in no layer, and so may have one of every layer."""
    nodes = [n for n in ir.calls(graph) if without_numbers(ir.scope_of(n)) == ir.scope_of(n)]
    return tuple(sorted(len(_WIDE[str(n.target)](n)) for n in nodes if str(n.target) in _WIDE))


def _stream(node: torch.fx.Node) -> str:
    """The stream of a collective: its axes, which stand for its group here, or a message's direction and side."""
    if node.target in (send.op, receive.op):
        return stream_of(node)
    row = collectives_table.row_of(node)
    return row.axis if row is not None else next(a for a in reversed(node.args) if isinstance(a, str))


class _Groups(dict[str, compat.Group]):
    """Groups named by their axes."""

    def __missing__(self, axes: str) -> compat.Group:
        return compat.Group(axes, 0)


def _collective_forms() -> dict[str, Callable[..., Any]]:
    """Those of a process, without one."""
    return {**compat.collective_forms(_Groups()), **{name: KERNELS[name].op for name in compat.CONVERTED_IN_GROUP}}
