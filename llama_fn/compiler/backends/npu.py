"""npu: the lowered graph as one Ascend GE graph or a few, through torchair, the graph engine of torch_npu.

Our ops are written in their `npu` forms, what depends on no input is computed once, and the step is converted: static
shapes, donated inputs as RefData that the graph updates in place. In form `whole` it is one graph. In form `calls` the
microbatch is a graph that is run again and again, and what stands before and after its calls are two more. They hand
each other tensors of the device; sums of gradients are RefData of the microbatch's graph. Nothing falls back: an
operator without a converter is an error before anything compiles. GE itself compiles at the first call.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kernels.registry import KERNELS
from llama_fn import compat
from llama_fn.ascend.ge_text import ge_scopes, ge_text
from llama_fn.compiler import ir, ranges
from llama_fn.compiler.backends import Executable, Program, communication, npu_cache
from llama_fn.compiler.backends.ge_counts import of_graph
from llama_fn.compiler.backends.in_turn import between_stages, in_turn
from llama_fn.compiler.backends.npu_forms import laid_out
from llama_fn.compiler.backends.npu_graphs import NpuGraph, npu_graphs
from llama_fn.distributed import Messages, Processes
from llama_fn.errors import UserError

log = logging.getLogger("llama_fn.npu")


def compile(
    program: Program,
    device: str = "npu",
    processes: Processes | None = None,
    form: str = "auto",
    streams: str = "by_axis",
    cache: Path | None = None,
    write: Callable[[str, GeFiles], None] | None = None,
) -> Executable:
    """`form`: whole is one GE graph, calls one for each body and what stands between its calls, auto by their size;
    `streams`: by_axis puts the collectives of each mesh axis, and the messages of each direction, on a stream of their
    own, one leaves all of them on GE's one stream; `cache`: the folder of compiled graphs (npu_cache.py); `write`
    gets the name and the files of each graph before anything runs (inspect/dump.py).

    UserError where an op has no converter, and where the stages of a pipeline would wait for ever on one stream.
    """
    messages = Messages(processes, device) if processes and len(program.graphs) > 1 else None
    gm, on_streams = laid_out(program, processes, form, messages, streams == "by_axis")
    graphs = convert(program, gm, device, processes, on_streams)
    keys = npu_cache.keys({body: graph.ge for body, graph in graphs.items()}, cache, processes is not None)
    texts = {body: ge_text(graph.ge.proto, graph.ge.shapes) for body, graph in graphs.items()}
    names = {body: "" if body is gm else name for body, name in {**ir.subgraphs(gm), gm: ""}.items()}
    if write is not None:
        for body, graph in graphs.items():
            write(names[body], graph.files(texts[body]))
    runs = {body: npu_cache.kept(graph.run, cache, keys.get(body, "")) for body, graph in graphs.items()}
    between = between_stages(messages, communication(program, "npu", processes))
    run_all = runs[gm] if gm in runs else in_turn(gm, runs, between)

    @torch.no_grad()
    def run(flat: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return run_all(list(flat))

    origins = [npu_cache.origin(text, cache, keys.get(body, "")) for body, text in texts.items()]
    scopes = _unambiguous([ge_scopes(graph.ge.proto) for graph in graphs.values()])
    text = "\n".join([*texts.values(), *([] if gm in graphs else [ir.as_text(gm, "npu")])])
    return Executable(run, text, tuple(origins), local=processes is not None, scopes=scopes, device=device)


def _unambiguous(scopes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The ranges of ops by name, but for a name that two graphs give to ops of different scopes: a profile of the
    device does not say which of the graphs it saw."""
    several: dict[str, set[str]] = defaultdict(set)
    for name, where in (pair for each in scopes for pair in each.items()):
        phase, _, scope = where.partition(" ")
        several[name].add(ranges.title(scope, phase))
    return {name: next(iter(each)) for name, each in several.items() if len(each) == 1}


@dataclass(frozen=True)
class GeFiles:
    """What is to be seen of a GE graph: the GraphDef as protobuf text, and as a model file (.air); torchair's options,
    as JSON; and a line per op."""

    pbtxt: str
    air: bytes
    options: str
    text: str


@dataclass(frozen=True)
class _Graph:
    """A GE graph. `kept`: which of its inputs are, overwritten, which of its results. `positions`: by mesh axes, what
    it takes behind its inputs."""

    ge: compat.GeGraph
    kept: Mapping[int, int]
    positions: Mapping[str, int]
    device: str

    @cached_property
    def placed(self) -> list[torch.Tensor]:
        """The positions on the device, made when the graph first runs."""
        return [torch.tensor([position], device=self.device) for position in self.positions.values()]

    def files(self, text: str) -> GeFiles:
        """`text`: of its ops."""
        return GeFiles(self.ge.pbtxt(), self.ge.air(), self.ge.options(self.kept, self.positions), text)

    def run(self, flat: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        results = list(self.ge.run(*flat, *self.placed))
        for number, i in sorted(self.kept.items()):
            results.insert(number, flat[i])
        flat.clear()
        return results


def convert(
    program: Program,
    gm: torch.fx.GraphModule,
    device: str,
    processes: Processes | None,
    streams: Mapping[str, str],
) -> dict[torch.fx.GraphModule, _Graph]:
    """The GE graphs of `gm`, if it calls bodies those of the bodies; `streams` of collectives, by their groups.
    UserError listing every operator that Ascend has none for."""
    collectives = {**communication(program, "npu", processes), **_named_groups(processes)}
    compat.load_torchair()
    made = npu_graphs(gm, collectives, device)
    for graph in made.values():
        log.info("GE graph: %s", of_graph(graph.gm, "", 1).told)
    return {body: _converted(graph, streams, device, processes) for body, graph in made.items()}


def _converted(graph: NpuGraph, streams: Mapping[str, str], device: str, processes: Processes | None) -> _Graph:
    refuse_unsupported(graph.gm)
    values = [compat.node_value(node) for node in ir.placeholders(graph.gm.graph)]
    scopes = {n.name: f"{ir.phase_of(n)} {ir.scope_of(n)}" for n in ir.calls(graph.gm.graph)}
    groups = processes.groups(graph.positions) if processes else {}
    positions = {axes: groups[axes].index for axes in graph.positions}
    return _Graph(compat.ge_convert(graph.gm, values, scopes, streams), graph.kept, positions, device)


def _named_groups(processes: Processes | None) -> dict[str, Callable[..., Any]]:
    """The ops that stay as they are but for the name of their process group in the place of the axes."""
    if processes is None:
        return {}

    def form(op: Any) -> Callable[..., Any]:
        return lambda a, b, axes, n, transposed: op(a, b, processes.groups([axes])[axes].name, n, transposed)

    return {name: form(KERNELS[name].op) for name in compat.CONVERTED_IN_GROUP}


def refuse_unsupported(gm: torch.fx.GraphModule) -> None:
    """UserError with every operator of the graph that torchair cannot convert, and where it stands."""
    scopes: dict[object, dict[str, None]] = defaultdict(dict)
    for node in ir.calls(gm.graph):
        if hasattr(node.target, "_schema"):
            scopes[node.target][f"{ir.scope_of(node)}, {ir.phase_of(node)}"] = None
    missing = compat.without_converter(list(scopes))
    if missing:
        lines = [f"  {target} in {'; '.join(list(scopes[target])[:4])}" for target in missing]
        raise UserError(
            f"torchair of torch_npu {compat.TORCH_NPU} has no converter for {len(missing)} operators of this graph:\n"
            + "\n".join(lines)
            + "\nWrite them with other operators, in the kernel's `npu` form, or register a converter in "
            "llama_fn/compat/ge_converters.py"
        )
