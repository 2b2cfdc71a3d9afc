"""What a mesh does to a model, before anything is allocated: time and memory of tracing and lowering, the bytes of the
state on every device under each preset of rules, the predicted peak and the collectives of a step.

    python benchmarks/lower.py --preset llama_65b --mesh data:12,model:8 --rules fsdp_tp
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_fn.compiler import ir, stages
from llama_fn.config import Config, DataConfig, OptimConfig
from llama_fn.errors import UserError
from llama_fn.model import arrays, train_step
from llama_fn.model.presets import PRESETS as MODELS
from llama_fn.model.presets import preset
from sharding import Mesh, collectives_table
from sharding.rules import PRESETS

PLACING = ("bucket", "overlap", "schedule")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_65b", choices=MODELS)
    parser.add_argument("--mesh", default="data:12,model:8")
    parser.add_argument("--rules", default="fsdp_tp", choices=PRESETS)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--reduce_per_microbatch", action="store_true")
    args = parser.parse_args()
    mesh = Mesh.parse(args.mesh)
    cfg = Config(
        model=replace(preset(args.preset), compute_dtype="bf16"),
        data=DataConfig(seq_len=args.seq_len, global_batch_size=args.batch, microbatches=args.microbatches),
        optim=OptimConfig(reduce_per_microbatch=args.reduce_per_microbatch),
    )
    start = time.perf_counter()
    arguments = train_step.abstract_arguments(cfg)
    traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*arguments)
    between = time.perf_counter()
    lowered = traced.lower(mesh, args.rules)
    end, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    often = ", reduced per microbatch" if args.reduce_per_microbatch else ""
    print(f"{args.preset}, {cfg.model.num_layers} layers, mesh {mesh}, rules {args.rules}, bf16")
    sizes = [f"{len(gm.graph.nodes):,}" for gm in lowered.graphs]
    print(f"{args.microbatches} microbatches{often}; {', '.join(sizes)} nodes{' by stage' if sizes[1:] else ''}")
    print(
        f"trace {between - start:.1f} s, lower {end - between:.1f} s, {end - start:.1f} s in all; peak {peak:.2f} GiB"
    )
    plain, placed = (
        max(one.memory_analysis().peak_bytes for one in each.by_stage) / 1e9
        for each in (traced.lower(mesh, args.rules, without=PLACING), lowered)
    )
    print(f"predicted peak per device {placed:.2f} GB; without {', '.join(PLACING)} {plain:.2f} GB")
    print(f"\n{'rules':<16} {'state, GB':>10} {'of the whole':>13}")
    for name in PRESETS:
        try:
            held = lowered if name == args.rules else traced.lower(mesh, name)
        except UserError as error:
            print(f"{name:<16} {str(error).partition('. ')[0]}")
            continue
        nodes = zip(ir.placeholders(held.graph_module.graph), held.signature.in_infos, strict=True)
        bytes_here = sum(
            n.meta["val"].numel() * i.dtype.itemsize for n, i in nodes if n.meta["path"].startswith("state")
        )
        print(f"{name:<16} {bytes_here / 1e9:>10.3f} {bytes_here / arrays.total_bytes(arguments[0]):>13.4f}")
    print(f"\n{collectives_table.as_text(lowered.collectives())}")


if __name__ == "__main__":
    main()
