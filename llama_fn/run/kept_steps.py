"""Whether a compiled step is kept whole for later starts, under which key, and what is said again of one that was."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import kernels
import llama_fn
import sharding
from kernels.registry import KERNELS
from llama_fn.compiler.kept import Asked, keep, load
from llama_fn.compiler.stages import Compiled
from llama_fn.config import Config
from llama_fn.config_checks import profiled
from llama_fn.config_fields import flat
from llama_fn.distributed import Processes
from sharding import Mesh
from sharding.stages import PIPE

# What a step depends on besides the whole of these sections.
SECTIONS = ("model", "optim", "mesh")
FIELDS = (
    "data.global_batch_size", "data.microbatches", "data.seq_len", "data.segments", "run.backend",
    "run.device", "run.attention", "run.check_finite", "run.norms_every", "run.deterministic", "run.strict",
)  # fmt: skip
# Variables that begin so may change what inductor writes; not where it lies, nor what names a launch.
ENVIRONMENT = ("TORCHINDUCTOR_", "OMP_", "MKL_", "CXX", "ATEN_CPU")
PACKAGES = (kernels, sharding, llama_fn)
_WHERE = "TORCHINDUCTOR_CACHE_DIR"
_SAID_BY = ("llama_fn.lints", "llama_fn.inductor")  # what is said of a step, and not of a folder or a machine


def can_be_kept(backend: str, device: str, mesh: Mesh) -> bool:
    """Whether a step can be kept whole: code for a CPU, of ops of this project alone, and of no stage of a pipeline."""
    own = {package.__name__ for package in PACKAGES}
    return (
        backend == "inductor"
        and device == "cpu"
        and PIPE not in dict(mesh.axes)
        and all(each.reference.__module__.split(".")[0] in own for each in KERNELS.values())
    )


def are_kept(cfg: Config, mesh: Mesh, dumped: bool) -> bool:
    """Whether steps of cfg are kept: they can be, and the run wants neither their graphs nor ranges for a profiler."""
    return can_be_kept(cfg.run.backend, cfg.run.device, mesh) and not dumped and not profiled(cfg)


def taken_up(cache: Path, asked: Asked, make: Callable[[], Compiled]) -> Compiled:
    """The step that is asked for, of an earlier start; or made now, and kept."""
    found = load(cache, asked)
    if found is not None:
        compiled, said = found
        for name, level, text in said:
            logging.getLogger(name).log(level, "%s", text)
        return compiled
    with gathered() as said:
        compiled = make()
    keep(cache, asked.key, compiled, said)
    return compiled


def key(cfg: Config, which: str, processes: Processes | None) -> str:
    """Of a step of cfg: `which` of them, and its flags."""
    values = {n: v for n, v in flat(cfg).items() if n in FIELDS or n.split(".")[0] in SECTIONS}
    return key_of(which, values, processes)


def key_of(which: str, values: Mapping[str, Any], processes: Processes | None) -> str:
    """Of a step: `which`, of what `values`, this project's sources, torch, and this process's place among several."""
    environment = sorted((n, v) for n, v in os.environ.items() if n.startswith(ENVIRONMENT) and n != _WHERE)
    rank = None if processes is None else processes.rank
    facts = [which, values, environment, rank, torch.__version__, torch.version.git_version, _sources()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """Of every file of this project that may have a part in a step."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@contextmanager
def gathered() -> Iterator[list[tuple[str, int, str]]]:
    """What is said of a step inside."""
    said: list[tuple[str, int, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name in _SAID_BY:
                said.append((record.name, record.levelno, record.getMessage()))

    listener, root = Listener(), logging.getLogger("llama_fn")
    root.addHandler(listener)
    try:
        yield said
    finally:
        root.removeHandler(listener)
