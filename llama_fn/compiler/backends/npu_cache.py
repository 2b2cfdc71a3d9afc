"""Compiled GE graphs kept on disk (--run.npu_cache): by GE's own ModelCache, which torchair leaves off for training.

GE takes a folder and a key. Where the folder has a compiled graph of that key, GE loads it, else it compiles and writes
one there. A lock by key lets one process of a machine compile, for whom the others wait (hicann/ge,
compiler/graph/build/model_cache.cc). GE does not look whether the graph is the one that was compiled: the key has to
say so. It hashes the graph, torchair's options and the versions of torch_npu, CANN and device. Each key has a folder of
its own below the cache, so that what one process lists there is complete (code_cache.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from llama_fn import compat
from llama_fn.compiler.backends import CodeOrigin, code_cache
from llama_fn.errors import UserError

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def keys(
    graphs: Mapping[torch.fx.GraphModule, compat.GeGraph], cache: Path | None, several: bool
) -> dict[torch.fx.GraphModule, str]:
    """The key of each graph, which GE will keep in `cache`; nothing without one. `several`: processes.

    UserError where groups of processes have other names at every start, which compiled graphs would look for.
    """
    if cache is None:
        return {}
    if several and not compat.names_groups():
        raise UserError(
            "--run.npu_cache needs a CANN whose HCCL lets process groups be named: with this one a graph that was "
            "compiled at an earlier start would look for groups of other names. Leave the flag out"
        )
    return {body: graph.keep_in(cache) for body, graph in graphs.items()}


def kept(run: Run, cache: Path | None, key: str) -> Run:
    """`run`, whose first call has GE compile or load: what is in the key's folder is proven whole before, and listed
    after."""
    if cache is None:
        return run
    folder, opened = cache / key, False

    def first(flat: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        nonlocal opened
        if opened:
            return run(flat)
        with code_cache.opened(folder, as_one=True):  # GE's index names its file
            results = run(flat)
        opened = True
        return results

    return first


def origin(text: str, cache: Path | None, key: str) -> CodeOrigin:
    """Where the code of a graph comes from; `text` of one that is not kept."""
    if cache is None:
        return CodeOrigin(hashlib.sha256(text.encode()).hexdigest(), None, from_cache=False)
    index = cache / key / f"{key}.idx"  # which GE writes last
    return CodeOrigin(key, index, from_cache=index.exists())
