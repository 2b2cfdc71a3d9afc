"""Backends: a lowered graph becomes something that runs on flat lists of tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama_fn import cost
from llama_fn.errors import UserError, nearest
from sharding import Mesh, P

BACKENDS = ("eager", "inductor", "interpret")


@dataclass(frozen=True)
class Program:
    """What a backend compiles: the graph of one device, the mesh, and how arguments and results are sharded over it."""

    graph_module: torch.fx.GraphModule
    mesh: Mesh
    inputs: tuple[P, ...]
    outputs: tuple[P, ...]
    output_shapes: tuple[tuple[int, ...], ...]  # global


def one_device(program: Program, backend: str) -> None:
    """UserError for a mesh of several devices in this one process."""
    n = program.mesh.size
    if n > 1:
        raise UserError(
            f"mesh {program.mesh} has {n} devices and backend {backend} runs one per process: start it with "
            f"torchrun --nproc_per_node={n}, or simulate all of them in this process with --run.backend=interpret"
        )


@dataclass(frozen=True)
class Executable:
    """`run(inputs) -> results` that take no donated buffer; donated inputs hold their new values afterwards.

    `text` is what will run, readable; `measured()` gives the memory of the last call where the backend counts it.
    """

    run: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
    text: str
    from_cache: bool = False
    measured: Callable[[], cost.Memory | None] = lambda: None


def get(name: str) -> Callable[..., Executable]:
    """The `compile(program, **options)` of a backend, imported on first use."""
    if name not in BACKENDS:
        raise UserError(f"backend {name!r} is unknown. {nearest(name, BACKENDS)}")
    compile_fn: Any = importlib.import_module(f"llama_fn.backends.{name}").compile
    return compile_fn
