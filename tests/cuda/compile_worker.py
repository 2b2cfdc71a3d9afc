"""Compiles a step for CUDA in a process that pretends to have an H100, and says what came of it.

python tests/cuda/compile_worker.py '{"dtype": "bf16", "microbatches": 2}' OUT.json
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import h100
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig
from llama_fn.distributed.processes import Processes
from llama_fn.model.presets import preset
from llama_fn.planner import config_stages
from sharding import Mesh


def config_of(job: dict[str, Any]) -> Config:
    size = {"num_layers": 3, "embed_dim": 128, "mlp_dim": 192, "seq_len": 32, "batch": 4} | job
    shape = {name: size[name] for name in ("num_layers", "embed_dim", "mlp_dim")}
    model = ModelConfig(num_heads=4, num_kv_heads=2, vocab_size=128, **shape)
    model = replace(preset(job["preset"]) if "preset" in job else model, compute_dtype=job["dtype"])
    data = DataConfig(seq_len=size["seq_len"], global_batch_size=size["batch"], microbatches=job["microbatches"])
    return Config(model, data=data, run=RunConfig(steps=4))


def member(mesh: Mesh) -> Processes | None:
    """The first process of a mesh whose others do not exist: its groups have members and names, and carry nothing."""
    if mesh.size == 1:
        return None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.size)
    return Processes(mesh, 0, watchdog=None, backend="fake")  # type: ignore[arg-type]


def made(job: dict[str, Any]) -> dict[str, Any]:
    """What the step's compilation came to: its operators, its CUDA graphs, and whose memory its results are in."""
    built: list[str] = []
    h100.pretend(built)
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx

    cfg = config_of(job)
    graphs: list[dict[str, Any]] = []
    memory: list[torch.Tensor] = []

    def replayed(model: Any, static_input_idxs: Any = (), mutated_input_idxs: Any = (), **_: Any) -> Any:
        """A CUDA graph whose results are in the same memory after every run."""
        moving = {*mutated_input_idxs} - {*static_input_idxs}
        graphs.append({"written": len(mutated_input_idxs), "elsewhere": len(moving)})

        def replay(inputs: Any) -> Any:
            graphs[0]["copied"] = len(inputs) - len(static_input_idxs)
            return memory

        return replay

    mesh = Mesh.parse(job.get("mesh", ""))
    lowered = (config_stages.evaluation if job.get("evaluation") else config_stages.train)(cfg).lower(mesh, "fsdp_tp")
    memory += [torch.zeros(shape) for shape in lowered._output_shapes()]
    with mock.patch.object(compile_fx, "cudagraphify", replayed):
        step = lowered.compile("inductor", device="cuda", cache=None, processes=member(mesh))
    results = list(step.executable.run([torch.empty(i.shape, dtype=i.dtype) for i in lowered.local_signature.in_infos]))
    code = step.executable.code
    overwritten = {result.data_ptr() for result in results} & {each.data_ptr() for each in memory}
    return {
        "operators": sorted(set(re.findall(r"(?:torch\.ops|extern_kernels)\.([\w.]+)\(", code))),
        "kernels": len(built), "graphs": graphs, "not_graphed": counters["inductor"]["cudagraph_skips"],
        "devices": sorted(set(re.findall(r"empty_strided_(\w+)\(", code))),
        "overwritten_results": len(overwritten),
    }  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(made(json.loads(sys.argv[1])), indent=1))
