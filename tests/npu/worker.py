"""Lowers steps through the real torchair, in a process that has torch_npu and the CANN stand-in (standin.environment).

    python tests/npu/worker.py JOBS.json

A job: {"out": folder, "config": {dotted name: value}, "mesh": "data:2,model:4", "rules": "fsdp_tp", "ranks": [0],
"fuse": false}. Writes what `--run.dump_dir` writes, and the inputs' paths.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama_fn import config, stages, train_step
from llama_fn.backends.npu import compile
from llama_fn.dump import rank_folder
from llama_fn.processes import Processes
from sharding import Mesh


def member(mesh: Mesh, rank: int) -> Processes | None:
    """A process of the mesh whose others do not exist: its groups have members and names, and carry nothing."""
    if mesh.size == 1:
        return None
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.size)
    return Processes(mesh, rank, watch=None, backend="fake")  # type: ignore[arg-type]


def lower(job: dict[str, Any]) -> None:
    values = dict(job["config"])
    cfg = config.Config(model=config.preset(values.pop("model.preset", "llama_tiny")))
    cfg = config.with_values(cfg, values)
    traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(
        train_step.abstract_state(cfg), train_step.abstract_batch(cfg)
    )
    lowered = traced.lower(Mesh.parse(job.get("mesh", "")), job.get("rules", "fsdp_tp"), fuse=job.get("fuse", False))
    for rank in job.get("ranks", [0]):
        folder = rank_folder(Path(job["out"]), rank)
        lowered.compile(compile, device="npu:0", processes=member(lowered.mesh, rank), dump_to=folder)


def main() -> None:
    torch.npu.current_device()  # starts the device: meta functions ask it for its name
    for job in json.loads(Path(sys.argv[1]).read_text()):
        lower(job)
        print(f"lowered {job['out']}", flush=True)


if __name__ == "__main__":
    main()
