"""Lowers steps through the real torchair, in a process that has torch_npu and the CANN stand-in (standin.environment).

    python tests/npu/worker.py JOBS.json

A job: {"out": folder, "config": {dotted name: value}, "ranks": [0], "every_rank": false}. Writes what
`--run.dump_dir` writes.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as distributed_c10d
import torch_npu  # noqa: F401
from jobs import config_of
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchair._ge_concrete_graph import hcom_utils

from llama_fn.compiler.backends import communication
from llama_fn.compiler.backends.npu import compile
from llama_fn.compiler.ranges import shares_of
from llama_fn.compiler.stages import Lowered
from llama_fn.distributed import messages, processes
from llama_fn.distributed.processes import Processes
from llama_fn.inspect.dump import GE_OPTIONS, rank_folder, write_ge
from llama_fn.planner import config_stages
from sharding import Mesh
from sharding.collectives import axes_of

NAMES: dict[tuple[str, tuple[int, ...]], str] = {}  # of groups, by tag and ranks


def note_name(group: Any, backend: str, name: str) -> None:
    """Takes the place of telling HCCL what a group is called."""
    NAMES[distributed_c10d._get_group_tag(group), tuple(dist.get_process_group_ranks(group))] = name


def member(mesh: Mesh, rank: int) -> Processes | None:
    """A process of the mesh whose others do not exist: its groups have members and names, and carry nothing."""
    if mesh.size == 1:
        return None
    if dist.is_initialized():
        dist.destroy_process_group()
    NAMES.clear()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.size)
    return Processes(mesh, rank, watchdog=None, backend="fake")  # type: ignore[arg-type]


def lower(job: dict[str, Any]) -> None:
    """Of the ranks of a stage the first is converted: the graphs of the others are the same (test_train_npu.py compares
    those of real HCCL groups). With `every_rank` each is."""
    cfg = config_of(job)
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    first: dict[int, Path] = {}
    for rank in job["ranks"]:
        folder, stage = rank_folder(Path(job["out"]), rank), lowered.of_rank(rank).stage
        processes = member(lowered.mesh, rank)
        if stage in first and not job.get("every_rank"):
            copy_of_rank(first[stage], folder, lowered, processes)
            continue
        first[stage] = folder
        write = functools.partial(write_ge, folder)
        named = {"form": cfg.run.npu_form, "streams": cfg.run.npu_streams}
        options = {"processes": processes, "write": write, **named}
        compiled = lowered.of_rank(rank).compile(compile, device="npu:0", **options)
        scopes = compiled.executable.scopes
        unnamed = [
            name for name in re.findall(r"%(MatMul\S*): ", compiled.as_text()) if not shares_of(scopes.get(name, ""))
        ]
        # Of graphs of one step, ops may share a name: those have none.
        assert not unnamed or cfg.run.npu_form == "calls" or "pipe" in cfg.mesh.axes, (
            f"a profile could not say which scope these are: {unnamed}"
        )


def copy_of_rank(source: Path, folder: Path, lowered: Lowered, processes: Processes) -> None:
    """The files of another rank of the stage, with this rank's groups and positions."""
    communication(SimpleNamespace(graphs=lowered.graphs, mesh=lowered.mesh), "npu", processes)  # makes the groups
    if len(lowered.graphs) > 1:
        messages.Messages(processes, "npu")
    groups = {name: list(ranks) for (_, ranks), name in NAMES.items() if processes.rank in ranks}
    for path in sorted(source.iterdir()):
        content = path.read_bytes()
        if path.name.endswith(GE_OPTIONS):
            options = json.loads(content)
            options["groups"] = {name: groups[name] for name in options["groups"]}
            options["positions"] = {a: processes.mesh.index(processes.rank, axes_of(a)) for a in options["positions"]}
            content = json.dumps(options).encode()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(content)


def main() -> None:
    processes.named = messages.named = note_name
    encoded = hcom_utils.encode_pg_tag_ranklist
    hcom_utils.encode_pg_tag_ranklist = lambda tag, ranks: NAMES.get((tag, tuple(ranks))) or encoded(tag, ranks)
    torch.npu.current_device()  # starts the device: meta functions ask it for its name
    for job in json.loads(Path(sys.argv[1]).read_text()):
        began = time.perf_counter()
        lower(job)
        print(f"lowered {job['out']} in {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
