"""Run under torchrun: steps of llama_tiny with inductor on every mesh of WORLD_SIZE devices against one device.

    torchrun --nproc_per_node=2 tests/multirank/worker_steps.py CACHE [RULES[@MESH[@KV_HEADS]] ...]

RULES is a preset, all of them if none is given, on every mesh of its axes unless one is named, with 4 (MHA) and 2 kv
heads unless one is named. Prints a line per case; any rank that finds a difference raises.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from llama_fn.distributed import processes
from llama_fn.errors import UserError
from llama_fn.model import arrays, random, train_step
from sharding import Mesh
from sharding.simulate import join

AXES = {
    "dp": ("node", "data"), "zero1": ("node", "data"), "fsdp": ("node", "data"), "tp_sp": ("data", "model"),
    "fsdp_tp": ("node", "data", "model"), "fsdp_tp_ulysses": ("data", "context", "model"),
}  # fmt: skip
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
STEPS = 5


def config(dtype: str, kv_heads: int) -> Config:
    return Config(
        model=ModelConfig(compute_dtype=dtype, num_kv_heads=kv_heads),
        data=DataConfig(seq_len=32, global_batch_size=20, microbatches=5),
        optim=OptimConfig(warmup_steps=2), run=RunConfig(steps=10),
    )  # fmt: skip


def meshes(rules: str, world: int) -> list[str]:
    """Every way to lay `world` devices over the axes of a preset."""
    names = AXES[rules]
    sizes = [s for s in product(range(1, world + 1), repeat=len(names)) if prod(s) == world]
    return [",".join(f"{name}:{n}" for name, n in zip(names, s, strict=True)) for s in sizes]


def inputs(cfg: Config, seed: int) -> tuple[train_step.Batch, train_step.Hyper]:
    generator = torch.Generator().manual_seed(seed)
    d = cfg.data
    shape = (d.microbatches, d.global_batch_size // d.microbatches, d.seq_len + 1)
    ids = torch.randint(0, cfg.model.vocab_size, shape, generator=generator)
    mask = (torch.rand(ids[..., 1:].shape, generator=generator) > 0.1).float()
    batch = train_step.Batch(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), mask)
    return batch, train_step.hyperparameters(cfg)


def numbers(metrics: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([metrics["lm_loss"], metrics["grad_norm"]])


def alone(traced: stages.Traced, cfg: Config, cache: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    # The schedule counts in float32, whose exp and cos differ in the last digit between inductor and eager.
    step = traced.lower().compile("inductor", cache=cache)
    state, rows = arrays.materialize(train_step.abstract_state(cfg), random.key(0)), []
    for i in range(STEPS):
        state, metrics = step(state, *inputs(cfg, i))
        rows.append(numbers(metrics))
    return torch.stack(rows), tree.leaves(state.params)


def together(traced: stages.Traced, cfg: Config, rules: str, members: processes.Processes, cache: Path) -> tuple:
    lowered = traced.lower(members.mesh, rules)
    step = lowered.compile("inductor", cache=cache, processes=members)
    infos = train_step.abstract_state(cfg)
    layouts = lowered.inputs[: len(tree.leaves(infos))]
    state, rows = arrays.materialize(infos, random.key(0), parts=members.parts(infos, layouts)), []
    for i in range(STEPS):
        mine = members.local(inputs(cfg, i), lowered.inputs[len(layouts) :])
        state, metrics = step(state, *mine)
        rows.append(numbers(metrics))
    return torch.stack(rows), gathered(state, infos, layouts, members)


def gathered(state: Any, infos: Any, layouts: Any, members: processes.Processes) -> Any:
    """The global state on rank 0, None elsewhere."""
    whole = []
    for x, layout, info in zip(tree.leaves(state), layouts, tree.leaves(infos), strict=True):
        parts = [torch.empty_like(x) for _ in range(members.mesh.size)] if members.chief else None
        dist.gather(x.contiguous(), parts)
        whole.append(join(parts, layout, members.mesh, info.shape) if parts else None)
    return tree.unflatten(tree.flatten(state)[1], whole) if members.chief else None


def check(cfg: Config, rules: str, members: processes.Processes, cache: Path) -> None:
    dtype = cfg.model.compute_dtype
    case = f"{rules} on {members.mesh}, {dtype}, {cfg.model.num_kv_heads} kv heads"
    traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg))
    try:
        traced.lower(members.mesh, rules)
    except UserError as error:
        assert "do not divide" in str(error)
        if members.chief:
            print(f"{case}: does not fit", flush=True)
        return
    want, want_params = alone(traced, cfg, cache)
    got, state = together(traced, cfg, rules, members, cache)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=0)
    if state is not None:
        for a, b in zip(tree.leaves(state.params), want_params, strict=True):
            assert torch.linalg.vector_norm((a - b).double()) <= TOLERANCE[dtype] * torch.linalg.vector_norm(b.double())
        print(f"{case}: equal", flush=True)


def main() -> None:
    world = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    cache, chosen = Path(sys.argv[1]), sys.argv[2:] or list(AXES)
    members = processes.start(Mesh((("data", world),)), "cpu", 600)
    assert members is not None
    for choice in chosen:
        rules, _, rest = choice.partition("@")
        only_mesh, _, only_kv = rest.partition("@")
        for text in [only_mesh] if only_mesh else meshes(rules, world):
            for dtype, kv_heads in product(TOLERANCE, [int(only_kv)] if only_kv else [4, 2]):
                here = replace(members, mesh=Mesh.parse(text), _groups={})
                check(config(dtype, kv_heads), rules, here, cache)
    members.barrier()
    members.close()


if __name__ == "__main__":
    main()
