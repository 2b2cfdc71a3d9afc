"""A model of a work folder with its tokenizer, for the tools that use one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_fn import tree
from llama_fn.checkpoint import layout
from llama_fn.checkpoint.weights import Weights
from llama_fn.compiler.backends import code_cache
from llama_fn.config import ModelConfig, RunConfig
from llama_fn.data import tokenizer
from llama_fn.data.vocabularies import Tokenizer
from llama_fn.distributed import Processes, start
from llama_fn.errors import UserError
from llama_fn.launch import launched
from llama_fn.model import llama
from llama_fn.run import runtime
from sharding import Mesh
from sharding.rules import decoding


@dataclass(frozen=True)
class Loaded:
    """Parameters in float32, this process's part of them, and what they are of."""

    weights: Weights
    cfg: ModelConfig
    params: llama.Params
    pieces: Tokenizer
    tokenizer: Path
    device: str
    mesh: Mesh
    processes: Processes | None

    @property
    def chief(self) -> bool:
        """Whether this process speaks for all."""
        return self.processes is None or self.processes.chief

    def begin(self, name: str) -> int:
        """The token before a text, -1 for none: bos, eos, none or auto."""
        begun = {"bos": self.pieces.bos_id(), "eos": self.pieces.eos_id(), "none": -1}
        return begun[name if name != "auto" else "eos" if self.weights.step else "bos"]

    def close(self) -> None:
        """Leave the other processes."""
        if self.processes is not None:
            self.processes.close()

    def backend_options(self, backend: str) -> dict[str, Any]:
        """What compiling a step takes here."""
        options: dict[str, Any] = {} if self.processes is None else {"processes": self.processes}
        if backend == "interpret":
            return options
        options |= {"device": self.device}
        return options | ({} if backend == "eager" else {"cache": code_cache.usable(code_cache.default())})


def load(source: Path, tokenizer_path: str, dtype: Any, run: RunConfig, axes: str = "") -> Loaded:
    """The newest checkpoint of `source`, on the device of `run`, over a mesh of `axes`; UserError where there is none,
    and where no tokenizer is known."""
    logging.getLogger("llama_fn").setLevel(logging.WARNING)
    runtime.setup(run)
    mesh = _mesh(axes, run.backend)
    processes = start(mesh, run.device, run.timeout_s)
    weights = Weights(source, "--source")
    cfg = replace(weights.cfg, compute_dtype=dtype)
    path = Path(tokenizer_path) if tokenizer_path else _tokenizer(weights)
    pieces = tokenizer.load(path)
    tokenizer.check_vocabulary(pieces, cfg.vocab_size, path)
    infos, layouts, rank = llama.abstract_params(cfg), None, 0
    if processes is not None:
        rules, rank = decoding(mesh), processes.rank
        layouts = [rules.layout(info.axes, info.table, mesh) for info in tree.leaves(infos)]
    params = weights.load(infos, layout.parts(infos, layouts, mesh, rank), run.device)
    return Loaded(weights, cfg, params, pieces, path, run.device, mesh, processes)


def _mesh(axes: str, backend: str) -> Mesh:
    """UserError for other axes than `model`, and for devices that nobody started processes for."""
    try:
        mesh = Mesh.parse(axes)
    except ValueError as error:
        raise UserError(f"--mesh={axes}: {error}") from None
    if other := [name for name, size in mesh.axes if size > 1 and name != "model"]:
        raise UserError(f"--mesh={axes}: a model is shared out over model:N; devices along {other[0]} would be copies")
    if mesh.size > 1 and launched().world == 1 and backend != "interpret":
        raise UserError(
            f"--mesh={axes} has {mesh.size} devices, and one process was started: start them with torchrun "
            f"--nproc_per_node={mesh.size}, or give --backend=interpret, which simulates them"
        )
    return mesh


def _tokenizer(weights: Weights) -> Path:
    """Beside the weights, where their run found one, or what their run trained."""
    named, workdir = weights.meta["config"].get("data.tokenizer"), weights.folder.parent.parent
    known = [*filter(None, [weights.tokenizer, Path(named) if named else None])]
    trained = sorted((workdir / "data").glob("tokenizer_*.model"), key=lambda path: path.stat().st_mtime)
    there = [path for path in [*known, *trained[-1:]] if path.exists()]
    if not there:
        raise UserError(f"{workdir} has no tokenizer: name one with --tokenizer")
    return there[0]
