"""Executes dumped GE graphs on the CPU, op by op; the graphs of several ranks in lockstep for the Hcom ops.

Reads what llama_fn/inspect/dump.py writes for a rank: the GraphDef as text, and the options with the written inputs.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import standin
import torch
from ge_fused_ops import OPS

from llama_fn.inspect import dump

PROTO_DTYPES = {
    "DT_FLOAT": torch.float32, "DT_FLOAT16": torch.float16, "DT_BF16": torch.bfloat16, "DT_INT64": torch.int64,
    "DT_INT32": torch.int32, "DT_BOOL": torch.bool, "DT_UINT8": torch.uint8, "DT_INT8": torch.int8,
}  # fmt: skip
Group = list[torch.Tensor]


def _all_to_all(attrs: Any, xs: Group) -> Group:
    pieces = [x.chunk(len(xs)) for x in xs]
    return [torch.cat([sent[i] for sent in pieces]) for i in range(len(xs))]


def _reduced(attrs: Any, xs: Group) -> torch.Tensor:
    kind = attrs["reduction"] or attrs["reduce_op"]
    return reduce({"sum": torch.add, "max": torch.maximum}[kind], xs)


def _turned(x: torch.Tensor, turn: bool) -> torch.Tensor:
    return x.t() if turn else x


def _all_gather_matmul(attrs: Any, xs: Group, ws: Group, bias: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    whole = torch.cat(xs)
    return [(whole @ _turned(w, attrs["is_trans_b"]), whole) for w in ws]


def _matmul_reduce_scatter(attrs: Any, xs: Group, ws: Group, bias: Any) -> Group:
    products = [_turned(x, attrs["is_trans_a"]) @ _turned(w, attrs["is_trans_b"]) for x, w in zip(xs, ws, strict=True)]
    return [piece.clone() for piece in _reduced(attrs, products).chunk(len(xs))]


COLLECTIVES: dict[str, Callable[..., Sequence[Any]]] = {
    "HcomAllGather": lambda attrs, xs: [torch.cat(xs)] * len(xs),
    "HcomAllReduce": lambda attrs, xs: [_reduced(attrs, xs)] * len(xs),
    "HcomReduceScatter": lambda attrs, xs: [p.clone() for p in _reduced(attrs, xs).chunk(len(xs))],
    "HcomAllToAll": _all_to_all,
    "HcomAllToAllV": lambda attrs, xs, *counts: _all_to_all(attrs, xs),  # we exchange equal parts only
    "AllGatherMatmul": _all_gather_matmul,
    "MatmulReduceScatter": _matmul_reduce_scatter,
}


class Attrs:
    """Attributes by name, None for one that is not there."""

    def __init__(self, attr: Any) -> None:
        self.attr = attr

    def __getitem__(self, name: str) -> Any:
        if name not in self.attr:
            return None
        value = self.attr[name]
        kind = value.WhichOneof("value")
        if kind == "list":
            return next((list(getattr(value.list, f)) for f in ("i", "f", "b") if getattr(value.list, f)), [])
        return value.s.decode() if kind == "s" else getattr(value, kind)


def _messages() -> Any:
    """The wheel's own protobuf classes, without importing torch_npu."""
    site, _ = standin.prepare()
    file = next(site.glob("torch_npu/dynamo/torchair/_ge_concrete_graph/*_3_19_pb2.py"))
    spec = importlib.util.spec_from_file_location("ge_ir", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GeRank:
    """One rank's graph, decoded once."""

    def __init__(self, folder: Path, graph: str) -> None:
        from google.protobuf import text_format

        proto = (folder / dump.ge_file(dump.GE_GRAPH, graph)).read_text()
        self.proto = text_format.Parse(proto, _messages().GraphDef())
        options = json.loads((folder / dump.ge_file(dump.GE_OPTIONS, graph)).read_text())
        self.groups: dict[str, list[int]] = options["groups"]
        self.written = {int(out): at for out, at in options["written_inputs"].items()}
        self.inputs: list[int] = options["inputs"]
        self.results: list[int | dict] = options["results"]
        self.ops = list(self.proto.op)
        self.sources = [[i for i in op.input if not i.endswith(":-1")] for op in self.ops]
        self.constants = {op.name: _constant(op) for op in self.ops if op.type == "Const"}
        last = {name: n for n, names in enumerate(self.sources) for name in names}
        self.dying: dict[int, list[str]] = {}
        for name, n in last.items():
            self.dying.setdefault(n, []).append(name)


def _constant(op: Any) -> torch.Tensor:
    held = op.attr["value"].t
    name = held.desc.DESCRIPTOR.fields_by_name["dtype"].enum_type.values_by_number[held.desc.dtype].name
    if not held.data:
        return torch.empty(list(held.desc.shape.dim), dtype=PROTO_DTYPES[name])
    return torch.frombuffer(bytearray(held.data), dtype=PROTO_DTYPES[name]).reshape(list(held.desc.shape.dim))


class GeInterpreter:
    """`run(inputs per rank) -> results per rank`; donated inputs hold their new values afterwards."""

    def __init__(self, folders: Sequence[Path], graph: str = "") -> None:
        self.ranks = [GeRank(folder, graph) for folder in folders]
        for rank in self.ranks[1:]:
            assert [op.type for op in rank.ops] == [op.type for op in self.ranks[0].ops]

    @torch.no_grad()
    def run(self, inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        values: list[dict[str, Any]] = [{} for _ in self.ranks]
        for n, op in enumerate(self.ranks[0].ops):
            if op.type in ("Data", "RefData"):
                made = [x[r.inputs[r.ops[n].attr["index"].i]] for x, r in zip(inputs, self.ranks, strict=True)]
            elif op.type == "Const":
                made = [rank.constants[rank.ops[n].name] for rank in self.ranks]
            elif op.type == "NetOutput":
                break
            else:
                made = self._computed(n, values)
            for held, rank, value in zip(values, self.ranks, made, strict=True):
                name = rank.ops[n].name
                several = isinstance(value, (tuple, list))
                held |= {f"{name}:{i}": v for i, v in enumerate(value)} if several else {f"{name}:0": value}
                for dead in rank.dying.get(n, ()):
                    held.pop(dead, None)
        return [self._finished(r, n, held, inputs[r]) for r, held in enumerate(values)]

    def _computed(self, n: int, values: list[dict[str, Any]]) -> list[Any]:
        kind, attrs = self.ranks[0].ops[n].type, [Attrs(rank.ops[n].attr) for rank in self.ranks]
        args = [
            [held[name] if name else None for name in rank.sources[n]]
            for held, rank in zip(values, self.ranks, strict=True)
        ]
        if kind in COLLECTIVES:
            return self._together(kind, attrs, args)
        if kind not in OPS:
            raise NotImplementedError(f"GE op {kind} is written in neither ge_ops.py nor ge_fused_ops.py")
        return [OPS[kind](a, *x) for a, x in zip(attrs, args, strict=True)]

    def _together(self, kind: str, attrs: list[Attrs], args: list[list[Any]]) -> list[Any]:
        made: list[Any] = [None] * len(self.ranks)
        for r, rank in enumerate(self.ranks):
            members = rank.groups[attrs[r]["group"]]
            if members[0] == r:
                results = COLLECTIVES[kind](attrs[r], *([args[m][i] for m in members] for i in range(len(args[r]))))
                for member, result in zip(members, results, strict=True):
                    made[member] = result
        return made

    def _finished(self, r: int, n: int, held: dict[str, Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rank = self.ranks[r]
        outputs = [held[name] for name in rank.sources[n]]
        for out, at in rank.written.items():
            inputs[rank.inputs[at]].copy_(outputs[out])
        return [outputs[out].clone() if isinstance(out, int) else _input(inputs, **out) for out in rank.results]


def _input(
    inputs: Sequence[torch.Tensor], input: int = 0, view_of: int | None = None, shape: Sequence[int] = (),
    stride: Sequence[int] = (), offset: int = 0,
) -> torch.Tensor:  # fmt: skip
    """A result that GE does not return: an input, overwritten or not, or a view of one."""
    return inputs[input] if view_of is None else inputs[view_of].as_strided(shape, stride, offset)
