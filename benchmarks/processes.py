"""Tokens/s of the compiled step over several processes, and the share of its time that goes into collectives:

    torchrun --nproc_per_node=2 benchmarks/processes.py --mesh data:2 --rules fsdp

The share is the time rank 0 spends starting collectives and waiting for them, from torch's profiler, over the step.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from llama_fn import compat, tree
from llama_fn.compiler import stages
from llama_fn.config import Config, DataConfig, RunConfig
from llama_fn.distributed import processes
from llama_fn.model import arrays, random, train_step
from llama_fn.model.presets import preset
from sharding import Mesh

SHAPES = {"llama_tiny": (8, 256), "llama_60m": (4, 512)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_tiny", choices=SHAPES)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--mesh", default="data:2")
    parser.add_argument("--rules", default="fsdp")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    mesh = Mesh.parse(args.mesh)
    members = processes.start(mesh, "cpu", 600)
    if members is None:
        raise SystemExit(f"start with torchrun --nproc_per_node={mesh.size} benchmarks/processes.py")
    torch.set_num_threads(max(1, compat.physical_cores() // mesh.size))
    compat.keep_memory()
    batch, seq = SHAPES[args.preset]
    cfg = Config(
        model=replace(preset(args.preset), compute_dtype=args.dtype),
        data=DataConfig(seq_len=seq, global_batch_size=batch), run=RunConfig(steps=1000),
    )  # fmt: skip
    state, *inputs = train_step.abstract_arguments(cfg)
    lowered = stages.jit(train_step.make_train_step(cfg), donate=0).trace(state, *inputs).lower(mesh, args.rules)
    with tempfile.TemporaryDirectory() as cache:
        step = lowered.compile("inductor", cache=Path(cache), processes=members)
    count = len(tree.leaves(state))
    held = arrays.materialize(state, random.key(0), parts=members.parts(state, lowered.inputs[:count]))
    ids = torch.randint(0, cfg.model.vocab_size, (1, batch, seq + 1), generator=torch.Generator().manual_seed(0))
    whole = train_step.Batch(ids[..., :-1], ids[..., 1:], torch.ones(1, batch, seq))
    mine = members.local((whole, train_step.hyperparameters(cfg)), lowered.inputs[count:])
    seconds, share = [], 0.0
    for i in range(args.steps + 2):
        start = time.perf_counter()
        with torch.profiler.profile() if i > args.steps else contextlib.nullcontext() as profile:
            held, _ = step(held, *mine)
        if i and i <= args.steps:
            seconds.append(time.perf_counter() - start)
        elif i:
            events = [e for e in profile.key_averages() if e.key.startswith("_c10d_functional::")]
            share = sum(e.self_cpu_time_total for e in events) / 1e6 / statistics.median(seconds)
    if members.chief:
        sent = sum(row.count * row.bytes for row in lowered.collectives())
        median = statistics.median(seconds)
        print(f"{args.preset} {args.dtype}, mesh {mesh}, rules {args.rules}, gloo on one machine")
        print(f"step {median * 1e3:.1f} ms, {batch * seq / median:.0f} tokens/s")
        print(f"collectives: {sent / 1e6:.1f} MB sent per device and step, {share:.1%} of the step's time")
    members.barrier()
    members.close()


if __name__ == "__main__":
    main()
