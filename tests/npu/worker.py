"""Lowers steps through the real torchair, in a process that has torch_npu and the CANN stand-in (standin.environment).

    python tests/npu/worker.py JOBS.json

A job: {"out": folder, "config": {dotted name: value}, "ranks": [0]}. Writes what `--run.dump_dir` writes.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from jobs import config_of
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama_fn.compiler.backends.npu import compile
from llama_fn.compiler.ranges import shares_of
from llama_fn.distributed.processes import Processes
from llama_fn.inspect.dump import rank_folder, write_ge
from llama_fn.planner import config_stages
from sharding import Mesh


def member(mesh: Mesh, rank: int) -> Processes | None:
    """A process of the mesh whose others do not exist: its groups have members and names, and carry nothing."""
    if mesh.size == 1:
        return None
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.size)
    return Processes(mesh, rank, watchdog=None, backend="fake")  # type: ignore[arg-type]


def lower(job: dict[str, Any]) -> None:
    cfg = config_of(job)
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    for rank in job["ranks"]:
        folder = rank_folder(Path(job["out"]), rank)
        write = functools.partial(write_ge, folder)
        named = {"form": cfg.run.npu_form, "streams": cfg.run.npu_streams}
        options = {"processes": member(lowered.mesh, rank), "write": write, **named}
        compiled = lowered.of_rank(rank).compile(compile, device="npu:0", **options)
        scopes = compiled.executable.scopes
        unnamed = [
            name for name in re.findall(r"%(MatMul\S*): ", compiled.as_text()) if not shares_of(scopes.get(name, ""))
        ]
        # Of graphs of one step, ops may share a name: those have none.
        assert not unnamed or cfg.run.npu_form == "calls" or "pipe" in cfg.mesh.axes, (
            f"a profile could not say which scope these are: {unnamed}"
        )


def main() -> None:
    torch.npu.current_device()  # starts the device: meta functions ask it for its name
    for job in json.loads(Path(sys.argv[1]).read_text()):
        lower(job)
        print(f"lowered {job['out']}", flush=True)


if __name__ == "__main__":
    main()
