"""Backends: a lowered graph becomes something that runs on flat lists of tensors."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.registry import of_node
from llama_fn import compat
from llama_fn.compiler import calls, liveness
from llama_fn.compiler.backends.in_turn import Order
from llama_fn.distributed import Processes
from llama_fn.errors import UserError, nearest
from sharding import Mesh, P
from sharding.simulate import COLLECTIVES, FUSED
from sharding.stages import PIPE, stage_of

BACKENDS = ("eager", "inductor", "interpret", "npu")


@dataclass(frozen=True)
class Program:
    """What a backend compiles: the graph of a device of each stage, of which there is one without a pipeline, the mesh,
    and how arguments and results are sharded over it.

    `weights` are the inputs that stay in the same memory from call to call: parameters, moments and hyper-parameters.
    """

    graphs: tuple[torch.fx.GraphModule, ...]
    mesh: Mesh
    inputs: tuple[P, ...]
    outputs: tuple[P, ...]
    output_shapes: tuple[tuple[int, ...], ...]  # global
    weights: tuple[int, ...] = ()

    def graph_of(self, processes: Processes | None) -> torch.fx.GraphModule:
        """The graph that this process runs: of a pipeline, that of its stage."""
        return self.graphs[stage_of(self.mesh, processes.rank if processes else 0)]

    def ranks(self, stage: int) -> list[int]:
        """The devices of a stage, in the order of their ranks."""
        return [rank for rank in range(self.mesh.size) if stage_of(self.mesh, rank) == stage]

    @property
    def stage_mesh(self) -> Mesh:
        """The mesh of the devices of one stage."""
        return Mesh(tuple(axis for axis in self.mesh.axes if axis[0] != PIPE))


def communication(program: Program, backend: str, processes: Processes | None) -> Mapping[str, Callable[..., Any]]:
    """How this process runs the graph's collectives, by op name; UserError for a mesh whose other devices have none."""
    n = program.mesh.size
    if processes is not None:
        ops = [node for gm in program.graphs for node, _ in calls.counted(gm)]  # groups are made by all, in one order
        sending = [n for n in ops if (r := of_node(n.target)) and (r.name in COLLECTIVES or r.name in FUSED)]
        used = [a for n in sending for a in n.args[1:3] if isinstance(a, str)]  # a wait names none
        return compat.collective_forms(processes.groups(used))
    if n > 1:
        raise UserError(needs_processes(program.mesh, backend))
    return {}


def needs_processes(mesh: Mesh, backend: str) -> str:
    """What to say of a mesh of several devices in a single process."""
    return (
        f"mesh {mesh} has {mesh.size} devices and backend {backend} runs one per process: start it with "
        f"torchrun --nproc_per_node={mesh.size}, or simulate all of them in this process with --run.backend=interpret"
    )


@dataclass(frozen=True)
class CodeOrigin:
    """Which compiled code runs, so that "is this stale?" has an answer.

    `key`: what it depends on, hashed: of inductor the graph, settings and version; of GE the graph. `file`: the code
    itself, None where it is not kept on disk. `from_cache`: an earlier compilation wrote it.
    """

    key: str
    file: Path | None
    from_cache: bool

    def __str__(self) -> str:
        """ "code f3xmkmn, compiled 2 h ago, /home/me/.cache/llama_fn/x.py"."""
        return f"code {self.key[:12]}, {self.age}" + (f", {self.file}" if self.file else "")

    @property
    def age(self) -> str:
        """ "compiled 2 h ago"."""
        if self.file is None:
            return "not kept on disk"
        if not self.from_cache:
            return "compiled now"
        return f"compiled {_ago(time.time() - self.file.stat().st_mtime)}" if self.file.exists() else "since deleted"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


@dataclass(frozen=True)
class Plain:
    """An executable as a later start can take it up without the backend: the code of its bodies, in which order they
    are called, and the groups of processes that the code names."""

    order: Order
    codes: tuple[compat.PlainCode, ...]
    groups: Mapping[str, compat.Group]


@dataclass(frozen=True)
class Executable:
    """`run(inputs) -> results` that take no donated buffer; donated inputs hold their new values afterwards.

    `text` is the graph that will run, readable, `code` what the backend made of it, where it says; `measured(stage)`
    gives the memory of the last call where the backend counts it; `scopes` names the range (compiler/ranges.py) of each
    op by the name that a profiler of the device gives it, where no range surrounds it; `plain` is what a later start
    needs of it, where that can be kept.
    """

    run: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
    text: str
    origins: tuple[CodeOrigin, ...] = ()  # none where nothing was compiled here
    local: bool = False  # arguments and results are this process's parts
    measured: Callable[[int], liveness.Memory | None] = lambda stage: None
    code: str = ""
    scopes: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    plain: Plain | None = None


def get(name: str) -> Callable[..., Executable]:
    """The `compile(program, **options)` of a backend, imported on first use."""
    if name not in BACKENDS:
        raise UserError(f"backend {name!r} is unknown. {nearest(name, BACKENDS)}")
    compile_fn: Any = importlib.import_module(f"llama_fn.compiler.backends.{name}").compile
    return compile_fn
