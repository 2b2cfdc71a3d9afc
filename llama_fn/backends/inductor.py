"""inductor: the lowered graph compiled by torch's inductor for CPU and CUDA, ahead of time.

Repeated layers are outlined, our ops expanded into one of their forms, and the whole compiled to an artifact that is
kept on disk under a key of everything it depends on: a second start of the same job loads it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.registry import of_node
from llama_fn import compat, ir, passes
from llama_fn.backends import Executable, forms
from llama_fn.passes.expand import expand
from llama_fn.passes.outline import outline
from llama_fn.passes.place import place
from sharding.mesh import Mesh

log = logging.getLogger("llama_fn.inductor")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llama_fn"


def compile(
    gm: torch.fx.GraphModule,
    device: str = "cpu",
    attention: str = "auto",
    cache: Path | None = None,
    outlined: bool = True,
) -> Executable:
    """`attention`: form of that kernel, auto picks by device; `cache`: folder of artifacts, None to keep nothing."""
    kind = torch.device(device).type
    chosen = forms.choose(kind, _compute_dtype(gm), attention)
    log.info("kernels: %s; the others reference, fused by inductor", ", ".join(f"{k}={v}" for k, v in chosen.items()))
    compat.trust_cpu_flags()
    gm = passes.copy_graph(gm)
    ctx = passes.Context(Mesh(), [])
    if outlined:
        gm = outline(gm, ctx)
    gm = expand(place(gm, device), chosen, forms.find)
    text = ir.as_text(gm, "inductor")
    inputs = [compat.node_value(node) for node in ir.placeholders(gm.graph)]
    options = _options(kind)
    where = None if cache is None else _place_in(cache) / f"{_key(text, options)}.artifact"
    artifact = None if where is None else _load(where)
    loaded = artifact is not None
    if artifact is None:
        artifact = compat.inductor_compile(gm, inputs, options)
        if where is not None:
            _save(artifact, where)

    @torch.no_grad()
    def run(flat: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        result = artifact(*flat)
        return result if isinstance(result, (tuple, list)) else [result]

    return Executable(run, text, from_cache=loaded)


def _compute_dtype(gm: torch.fx.GraphModule) -> torch.dtype:
    """The dtype of the matrix products."""
    products = [n for n in ir.calls(gm.graph) if (record := of_node(n.target)) and record.name == "einsum"]
    return compat.node_value(products[0]).dtype if products else torch.float32


def _options(kind: str) -> dict[str, Any]:
    return {"config_patches": {"triton.cudagraphs": True} if kind == "cuda" else {}}


def _key(text: str, options: dict[str, Any]) -> str:
    """Graph, versions and machine: the same key means that the compiled code would be the same."""
    facts = [text, repr(options), torch.__version__, platform.python_version(), platform.machine()]
    facts += [compat.cpu_model(), str(torch.get_num_threads())]
    if torch.cuda.is_available():
        facts.append(torch.cuda.get_device_name())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def _place_in(cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    compat.keep_compiled_code(cache / "code")
    return cache


def _load(where: Path) -> Any:
    if not where.is_file():
        return None
    try:
        return compat.load_artifact(where)
    except Exception as error:  # a damaged artifact costs a compilation, never a run
        log.warning(
            "compiled artifact %s cannot be loaded (%s: %s); compiling again", where, type(error).__name__, error
        )
        where.unlink(missing_ok=True)
        return None


def _save(artifact: Any, where: Path) -> None:
    """Write aside and rename: no other process ever sees half an artifact."""
    aside = where.with_name(f".{where.name}.{os.getpid()}")
    try:
        compat.save_artifact(artifact, aside)
        os.replace(aside, where)
    except (OSError, RuntimeError) as error:
        log.warning("compiled artifact is not kept as %s: %s; the next start compiles again", where, error)
        aside.unlink(missing_ok=True)
