"""Executes dumped GE graphs on the CPU, op by op; the graphs of several ranks in lockstep for the Hcom ops.

Reads what llama_fn/inspect/dump.py writes for a rank: the GraphDef as text, and the options with the written inputs.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Generator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import standin
import torch
from ge_fused_ops import OPS

from llama_fn.compiler.backends.together import Mailbox, Meeting, Message, together
from llama_fn.inspect import dump

PROTO_DTYPES = {
    "DT_FLOAT": torch.float32, "DT_FLOAT16": torch.float16, "DT_BF16": torch.bfloat16, "DT_INT64": torch.int64,
    "DT_INT32": torch.int32, "DT_INT16": torch.int16, "DT_BOOL": torch.bool,
    "DT_UINT8": torch.uint8, "DT_INT8": torch.int8,
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


class Pending(NamedTuple):
    """A message that has been asked for: who sends it, who receives it, and its tag."""

    source: int
    target: int
    tag: int


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
        self.positions = [torch.tensor([position]) for position in options["positions"].values()]
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
    """`run(inputs per rank) -> results per rank`; donated inputs hold their new values afterwards. `numbers`: of the
    ranks, where these are not the first ones."""

    def __init__(self, folders: Sequence[Path], graph: str = "", numbers: Sequence[int] | None = None) -> None:
        self.ranks = [GeRank(folder, graph) for folder in folders]
        self.numbers = list(numbers or range(len(folders)))
        for rank in self.ranks[1:]:
            assert [op.type for op in rank.ops] == [op.type for op in self.ranks[0].ops]

    @torch.no_grad()
    def run(self, inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        return run_stages([self], inputs)

    def steps(self, inputs: Sequence[Sequence[torch.Tensor]], mailbox: Mailbox) -> Generator[Any, Any, Any]:
        """The graph, up to where it waits for other stages; gives the results per rank."""
        inputs = [[*given, *rank.positions] for given, rank in zip(inputs, self.ranks, strict=True)]
        values: list[dict[str, Any]] = [{} for _ in self.ranks]
        for n, op in enumerate(self.ranks[0].ops):
            if op.type in ("Data", "RefData"):
                made = [x[r.inputs[r.ops[n].attr["index"].i]] for x, r in zip(inputs, self.ranks, strict=True)]
            elif op.type == "Const":
                made = [rank.constants[rank.ops[n].name] for rank in self.ranks]
            elif op.type == "NetOutput":
                break
            else:
                made = yield from self._computed(n, values, mailbox)
            for held, rank, value in zip(values, self.ranks, made, strict=True):
                name = rank.ops[n].name
                several = isinstance(value, list) or type(value) is tuple
                held |= {f"{name}:{i}": v for i, v in enumerate(value)} if several else {f"{name}:0": value}
                for dead in rank.dying.get(n, ()):
                    held.pop(dead, None)
        return [self._finished(r, n, held, inputs[r]) for r, held in enumerate(values)]

    def _computed(self, n: int, values: list[dict[str, Any]], mailbox: Mailbox) -> Generator[Any, Any, list[Any]]:
        kind, attrs = self.ranks[0].ops[n].type, [Attrs(rank.ops[n].attr) for rank in self.ranks]
        args: list[list[Any]] = []
        for held, rank in zip(values, self.ranks, strict=True):
            given = [held[name] if name else None for name in rank.sources[n] if not name.startswith("^")]
            for i, value in enumerate(given):
                if isinstance(value, Pending):  # a stream of its own brings it: only who reads it waits
                    given[i] = yield Message(value)
            args.append(given)
        members = [rank.groups.get(each["group"], []) for rank, each in zip(self.ranks, attrs, strict=True)]
        if kind == "HcomSend":
            for number, group, each, (x,) in zip(self.numbers, members, attrs, args, strict=True):
                assert x.dtype != torch.bfloat16, "the definition of HcomSend lists no bf16"
                mailbox.put(Pending(number, group[each["dest_rank"]], each["sr_tag"]), x.clone())
            return [None] * len(self.ranks)
        if kind == "HcomReceive":
            each_of = zip(self.numbers, members, attrs, strict=True)
            return [Pending(group[each["src_rank"]], number, each["sr_tag"]) for number, group, each in each_of]
        if kind in COLLECTIVES:
            meeting = Meeting(kind, (args, attrs, members), ())
            return meet_of([(self, meeting)])[0] if set(members[0]) <= set(self.numbers) else (yield meeting)
        if kind not in OPS:
            raise NotImplementedError(f"GE op {kind} is written in neither ge_ops.py nor ge_fused_ops.py")
        return [OPS[kind](a, *x) for a, x in zip(attrs, args, strict=True)]

    def _finished(self, r: int, n: int, held: dict[str, Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rank = self.ranks[r]
        outputs = [held[name] for name in rank.sources[n]]
        for out, at in rank.written.items():
            inputs[rank.inputs[at]].copy_(outputs[out])
        return [outputs[out].clone() if isinstance(out, int) else _input(inputs, **out) for out in rank.results]


def run_stages(stages: Sequence[GeInterpreter], inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Results per rank, of stages that each have a graph of their own, from inputs per rank."""
    mailbox = Mailbox()
    with torch.no_grad():
        programs = [stage.steps([inputs[i] for i in _places(stage, stages)], mailbox) for stage in stages]
        by_stage = together(programs, mailbox, lambda meetings: meet_of(list(zip(stages, meetings, strict=True))))
    results: dict[int, list[torch.Tensor]] = {}
    for stage, each in zip(stages, by_stage, strict=True):
        results |= dict(zip(_places(stage, stages), each, strict=True))
    return [results[i] for i in range(len(inputs))]


def _places(stage: GeInterpreter, stages: Sequence[GeInterpreter]) -> list[int]:
    """Where the inputs of a stage's ranks stand: by their numbers, or in order for a part of all ranks."""
    return stage.numbers if len(stages) > 1 else list(range(len(stage.ranks)))


def meet_of(arrived: list[tuple[GeInterpreter, Meeting]]) -> list[list[Any]]:
    """The results of a collective, by stage and rank."""
    kind = arrived[0][1].name
    assert all(meeting.name == kind for _, meeting in arrived)
    args, attrs, members = ({} for _ in range(3))
    for stage, meeting in arrived:
        for number, a, b, c in zip(stage.numbers, *meeting.given, strict=True):
            args[number], attrs[number], members[number] = a, b, c
    made: dict[int, Any] = {}
    for number, group in members.items():
        if group[0] == number:
            values = ([args[m][i] for m in group] for i in range(len(args[number])))
            made |= dict(zip(group, COLLECTIVES[kind](attrs[number], *values), strict=True))
    return [[made[number] for number in stage.numbers] for stage, _ in arrived]


def _input(
    inputs: Sequence[torch.Tensor], input: int = 0, view_of: int | None = None, shape: Sequence[int] = (),
    stride: Sequence[int] = (), offset: int = 0,
) -> torch.Tensor:  # fmt: skip
    """A result that GE does not return: an input, overwritten or not, or a view of one."""
    return inputs[input] if view_of is None else inputs[view_of].as_strided(shape, stride, offset)
