"""Run under torchrun: whole steps with inductor on every mesh of WORLD_SIZE devices against the step of one device.

    torchrun --nproc_per_node=2 tests/multirank/worker_steps.py CACHE RULES...

RULES is a preset, all of them if none is given; PRESET:4 takes only the model with 4 kv heads.
Prints a line per case; any rank that finds a difference raises.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from llama_fn import arrays, processes, random, stages, train_step, tree
from llama_fn.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from sharding import Mesh

MESHES = {
    "dp": ["data:2", "data:4", "node:2,data:2"],
    "zero1": ["data:2", "data:4"],
    "fsdp": ["data:2", "data:4", "node:2,data:2"],
    "tp_sp": ["model:2", "model:4"],
    "fsdp_tp": ["data:2", "model:2", "data:2,model:2"],
    "fsdp_tp_ulysses": ["context:2", "context:2,model:2", "data:2,context:2", "context:4"],
}
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
STEPS = 5


def config(dtype: str, kv_heads: int) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=2, embed_dim=64, num_heads=8, num_kv_heads=kv_heads, mlp_dim=48, vocab_size=96,
            compute_dtype=dtype,
        ),
        data=DataConfig(seq_len=16, global_batch_size=8, microbatches=2),
        optim=OptimConfig(warmup_steps=2), run=RunConfig(steps=10),
    )  # fmt: skip


def batch(cfg: Config, seed: int) -> train_step.Batch:
    generator = torch.Generator().manual_seed(seed)
    d = cfg.data
    shape = (d.microbatches, d.global_batch_size // d.microbatches, d.seq_len + 1)
    ids = torch.randint(0, cfg.model.vocab_size, shape, generator=generator)
    mask = (torch.rand(ids[..., 1:].shape, generator=generator) > 0.1).float()
    return train_step.Batch(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), mask)


def numbers(metrics: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([metrics["lm_loss"], metrics["grad_norm"]])


def alone(traced: stages.Traced, cfg: Config, cache: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    # The schedule counts in float32, whose exp and cos differ in the last digit between inductor and eager.
    step = traced.lower().compile("inductor", cache=cache)
    state, rows = arrays.materialize(train_step.abstract_state(cfg), random.key(0)), []
    for i in range(STEPS):
        state, metrics = step(state, batch(cfg, i))
        rows.append(numbers(metrics))
    return torch.stack(rows), tree.leaves(state.params)


def together(traced: stages.Traced, cfg: Config, rules: str, members: processes.Processes, cache: Path) -> tuple:
    lowered = traced.lower(members.mesh, rules)
    step = lowered.compile("inductor", cache=cache, processes=members)
    infos = train_step.abstract_state(cfg)
    layouts = lowered.inputs[: len(tree.leaves(infos))]
    state, rows = arrays.materialize(infos, random.key(0), parts=members.parts(infos, layouts)), []
    for i in range(STEPS):
        mine = members.local(batch(cfg, i), lowered.inputs[len(layouts) :])
        state, metrics = step(state, mine)
        rows.append(numbers(metrics))
    return torch.stack(rows), members.gathered(state, infos, layouts)


def check(cfg: Config, rules: str, members: processes.Processes, cache: Path) -> None:
    dtype = cfg.model.compute_dtype
    traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(
        train_step.abstract_state(cfg), train_step.abstract_batch(cfg)
    )
    want, want_params = alone(traced, cfg, cache)
    got, state = together(traced, cfg, rules, members, cache)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=0)
    if state is not None:
        for a, b in zip(tree.leaves(state.params), want_params, strict=True):
            assert torch.linalg.vector_norm((a - b).double()) <= TOLERANCE[dtype] * torch.linalg.vector_norm(b.double())
        print(f"{rules} on {members.mesh}, {dtype}, {cfg.model.num_kv_heads} kv heads: equal", flush=True)


def main() -> None:
    world = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    cache, chosen = Path(sys.argv[1]), sys.argv[2:] or list(MESHES)
    members = processes.start(Mesh((("data", world),)), "cpu", 600)
    assert members is not None
    for choice in chosen:
        rules, _, only = choice.partition(":")
        for mesh in (Mesh.parse(text) for text in MESHES[rules]):
            for dtype, kv_heads in ((d, n) for d in TOLERANCE for n in (8, 4) if not only or n == int(only)):
                if mesh.size == world:
                    check(config(dtype, kv_heads), rules, replace(members, mesh=mesh, _groups={}), cache)
    members.barrier()
    members.close()


if __name__ == "__main__":
    main()
