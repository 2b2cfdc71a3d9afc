"""What a run writes about its graphs (--run.dump_dir), and the names of the files.

rank_0/index.html          opens the others; written last: where it is, the dump is complete
rank_0/NN_NAME.txt         the graph after each stage: traced, partitioned, each pass, as the backend got it
rank_0/NN_NAME.json        traced and lowered, for Google's model-explorer; overlays NN_NAME.time_us.json, ...
rank_0/NN_code.txt         what the backend made of it, where it says
rank_0/summary.json        ops by scope and phase, collectives, FLOPs, memory: what graph_diff compares
rank_0/evaluation/         the same for the validation step
rank_0/stage_0/, ...       of a pipeline that one process simulates or plans: lowered graph, summary and index by stage

Of backend npu besides:
rank_0/ge_graph.pbtxt      the GraphDef that GE compiles, as text; opens in netron as any protobuf text
rank_0/ge_graph.air        the same as a model file, which CANN's atc compiles without a device
rank_0/ge_graph.txt        the same, a line per op
rank_0/ge_options.json     torchair's options, the process groups, and which input each result overwrites
                           --run.npu_form=calls: a set of the four for each graph, such as microbatch.ge_graph.pbtxt
rank_0/ge/                 what CANN writes itself (DUMP_GE_GRAPH)
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from kernels.registry import tensor_bytes
from llama_fn import compat
from llama_fn.ascend import budget
from llama_fn.ascend.budget import Budget
from llama_fn.compiler import cost, ir, stages
from llama_fn.compiler.backends.npu import GeFiles
from llama_fn.files import atomic
from llama_fn.hardware import Hardware
from llama_fn.inspect import explorer, pages
from llama_fn.inspect.pages import INDEX, SUMMARY, Stage
from llama_fn.inspect.summary import summary
from sharding import Mesh

log = logging.getLogger("llama_fn.dump")
TRACED, LOWERED, BACKEND, CODE = "traced", "lowered", "backend", "code"
GE_GRAPH, GE_AIR, GE_TEXT, GE_OPTIONS = "ge_graph.pbtxt", "ge_graph.air", "ge_graph.txt", "ge_options.json"
GE_OWN, EVALUATION, STAGE = "ge", "evaluation", "stage"
_OURS = re.compile(r"\d\d_\w+(\.\w+)?\.(txt|json)|(\w+\.)?ge_(graph|options)\.(pbtxt|air|txt|json)")


def rank_folder(folder: Path, rank: int) -> Path:
    """Where a rank dumps its graphs below --run.dump_dir."""
    return folder / f"rank_{rank}"


def write_ge(folder: Path, graph: str, files: GeFiles) -> None:
    """The files of one GE graph, whose name is "" where there is no other. Each is complete or not there."""
    for name, content in ((GE_OPTIONS, files.options), (GE_TEXT, files.text), (GE_GRAPH, files.pbtxt)):
        _write(folder / ge_file(name, graph), content)
    with atomic(folder / ge_file(GE_AIR, graph), "wb") as f:
        f.write(files.air)
    log.info("GE graph written to %s", folder)


def ge_file(name: str, graph: str) -> str:
    """microbatch.ge_graph.pbtxt, or ge_graph.pbtxt where the step is one graph."""
    return f"{graph}.{name}" if graph else name


def _write(path: Path, content: str) -> None:
    with atomic(path) as f:
        f.write(content)


class DumpWriter:
    """Writes the stages of one step into a folder as they come; what an earlier dump left there goes first."""

    def __init__(
        self, folder: Path, hardware: Hardware | None = None, mesh: Mesh | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`hardware`: whose peaks the overlay of times takes; None: there is no such overlay. `mesh`: what is lowered
        for. `about`: how the dump is made, in words by their names, for the index."""
        self.folder, self.hardware, self.mesh, self.about = folder, hardware, mesh or Mesh(), about or {}
        self.stages: list[Stage] = []
        self.before = ""
        for old in sorted(folder.glob("*"), key=lambda path: path.name != INDEX):  # the index first
            if old.name in (INDEX, SUMMARY) or _OURS.fullmatch(old.name):
                old.unlink()
            elif old.is_dir() and re.fullmatch(rf"{STAGE}_\d+", old.name):
                DumpWriter(old)

    def observer(self, traced: stages.Traced) -> Callable[[str, torch.fx.GraphModule], None]:
        """Record `traced`; what is returned sees the stages of lowering it."""
        self.graph(TRACED, traced.graph_module)
        return self.graph

    def graph(self, name: str, gm: torch.fx.GraphModule) -> None:
        """The next stage, and its JSON if it is one to look at in a browser."""
        text = ir.as_text(gm, name, note=_costs)
        nodes = sum(len(each.graph.nodes) for each in (gm, *ir.subgraphs(gm)))
        untitled = text.replace(f"graph {name} {{", "graph {")
        stage = self._next(name, text + "\n", nodes, untitled != self.before)
        self.before = untitled
        if name in (TRACED, LOWERED):
            for ending, content in explorer.files(gm, stage.prefix, self.hardware, self.mesh).items():
                _write(self.folder / f"{stage.prefix}{ending}.json", json.dumps(content))

    def _next(self, name: str, content: str, nodes: int | None = None, changed: bool = True) -> Stage:
        stage = Stage(len(self.stages), name, nodes, changed)
        _write(self.folder / f"{stage.prefix}.txt", content)
        self.stages.append(stage)
        return stage

    def finish(
        self, lowered: stages.Lowered, compiled: stages.Compiled | None = None, ge: tuple[Budget, str] | None = None
    ) -> None:
        """The lowered graph, the backend's part, the summary and, at last, the index. All stages of a pipeline, unless
        each has its own process, which writes its own. `ge`: of Ascend's graph engine, and why this form."""
        of_stages: dict[str, int] = {}
        if len(lowered.graphs) > 1 and (compiled is None or not compiled.executable.local):
            for one in lowered.by_stage:
                folder = self.folder / f"{STAGE}_{one.stage}"
                DumpWriter(folder, self.hardware, self.mesh, self.about)._finish(one, None, {}, None)
                of_stages[f"{folder.name}/{INDEX}"] = (folder / INDEX).stat().st_size
        self._finish(lowered, compiled, of_stages, ge)
        log.info("graphs of %s: %s", lowered.traced.name, self.folder / INDEX)

    def _finish(
        self, lowered: stages.Lowered, compiled: stages.Compiled | None, of_stages: dict[str, int],
        ge: tuple[Budget, str] | None,
    ) -> None:  # fmt: skip
        self.graph(LOWERED, lowered.graph_module)
        if compiled is not None:
            self._next(BACKEND, compiled.as_text() + "\n")
            if compiled.executable.code:
                self._next(CODE, compiled.executable.code)
        numbers = summary(lowered) | ({"ge": budget.as_json(*ge)} if ge else {})
        _write(self.folder / SUMMARY, json.dumps(numbers, indent=1))
        files = sorted(path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("."))
        sizes = {path.name: path.stat().st_size for path in files} | of_stages
        origins = compiled.executable.origins if compiled else ()
        told = budget.as_lines(ge[0]) if ge else []
        page = pages.page(lowered.title, numbers, self.stages, sizes, self.hardware, origins, self.about, told)
        _write(self.folder / INDEX, page)


def write_measured(
    folder: Path, lowered: stages.Lowered, seconds: Mapping[tuple[str, str], float], hardware: Hardware
) -> None:
    """Add what a profile measured by scope and phase, per step, to a finished dump of the same step: an overlay."""
    found = sorted(folder.glob(f"??_{LOWERED}.json"))
    if not found or not (folder / INDEX).exists():
        return
    name = found[-1].stem
    overlay = f"{name}{explorer.MEASURED_US}.json"
    content = explorer.measured(lowered.graph_module, name, seconds, hardware, lowered.mesh)
    _write(folder / overlay, json.dumps(content))
    link = f" <a href='{overlay}'>{overlay}</a> has what a profile measured of each scope, shared among its ops."
    _write(folder / INDEX, (folder / INDEX).read_text().replace(pages.MEASURED, link))
    log.info("measured times for model-explorer: %s", folder / overlay)


def _costs(node: torch.fx.Node) -> str:
    """Bytes of the result, FLOPs and sharding of a node."""
    if node.op == "output":
        return ""
    flops = cost.flops_of(node) if node.op == "call_function" else 0
    size = 0 if node.op == "call_function" and cost.is_view(node) else tensor_bytes(compat.node_value(node))
    parts = [f"{size} B" if size else "", f"{flops} FLOP" if flops else "", str(node.meta.get("sharding", ""))]
    return " ".join(filter(None, parts))
