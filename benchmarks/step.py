"""Our compiled training step against transformers' LlamaForCausalLM with torch's AdamW, eager and compiled.

    python benchmarks/step.py --preset llama_60m --dtype bf16

Every contender is a process of its own (same threads, same allocator settings, same shapes, same random tokens) that
sets up once and then runs a few steps whenever it is its turn, so that all of them meet the same machine. Prints
tokens/s, time to the first step with a cold and with a warm compile cache, peak memory, the ratios, and the matrix
product ceiling measured in the same run.

fp32: float32 throughout. bf16: float32 parameters and moments, bfloat16 forward and backward (the rivals by autocast).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from turns import Contender

HERE = Path(__file__).resolve().parent
CONTENDERS = ("ours", "transformers_eager", "transformers_compiled")
SHAPES = {"llama_tiny": (8, 256), "llama_60m": (4, 512), "llama_1b": (8, 2048)}


def contender(name: str, args: argparse.Namespace, cache: Path) -> Contender:
    script = HERE / ("worker_ours.py" if name == "ours" else "worker_transformers.py")
    batch, seq = SHAPES[args.preset]
    spec = {
        "preset": args.preset, "dtype": args.dtype, "device": args.device, "threads": args.threads,
        "batch": batch, "seq": seq, "compiled": name == "transformers_compiled", "attention": args.attention,
    }  # fmt: skip
    # Inductor keeps precompiled headers under the temporary folder, whatever its cache folder is.
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TMPDIR": str(cache), "BENCH_CACHE": str(cache)}
    return Contender(name, script, spec, cache, folders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_tiny", choices=SHAPES)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=6, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=3, help="steps in one turn")
    parser.add_argument("--attention", default="auto", help="form of our attention kernel")
    parser.add_argument("--only", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Path(folder) / name for name in args.only}
        cold, warm = {}, {}
        for name, cache in caches.items():
            cache.mkdir()
            worker = contender(name, args, cache)
            cold[name] = worker.first
            worker.close()
            print(f"{name}: cold start to first step {cold[name]['first_step_s']:.1f} s", flush=True)
        workers = {name: contender(name, args, cache) for name, cache in caches.items()}
        warm = {name: worker.first for name, worker in workers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        ceilings, peaks = [], {}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                answer = worker.turn(args.steps)
                seconds[name] += answer["seconds"]
                peaks[name] = answer["peak_bytes"]
                ceilings += [answer["ceiling_flops_per_s"]] if "ceiling_flops_per_s" in answer else []
        for worker in workers.values():
            worker.close()
    report(args, cold, warm, seconds, peaks, ceilings)


def report(args: argparse.Namespace, cold: Any, warm: Any, seconds: Any, peaks: Any, ceilings: list[float]) -> None:
    batch, seq = SHAPES[args.preset]
    step = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{args.preset} {args.dtype} on {args.device}, {args.threads} threads, batch {batch} x {seq}")
    print(f"{'':24}{'step ms':>10}{'tokens/s':>10}{'cold s':>9}{'warm s':>9}{'peak MB':>9}")
    for name in step:
        print(
            f"{name:24}{step[name] * 1e3:10.1f}{batch * seq / step[name]:10.0f}{cold[name]['first_step_s']:9.1f}"
            f"{warm[name]['first_step_s']:9.1f}{peaks[name] / 1e6:9.0f}"
        )
    if "ours" not in step:
        return
    rivals = [name for name in step if name != "ours"]
    for name in rivals:
        print(f"speed ours / {name}: {step[name] / step['ours']:.3f}")
    if rivals:
        print(f"speed ours / better rival: {min(step[n] for n in rivals) / step['ours']:.3f}")
    if "transformers_compiled" in step:
        rival = cold["transformers_compiled"]["first_step_s"]
        print(f"cold start ours / transformers_compiled: {cold['ours']['first_step_s'] / rival:.3f}")
    for name in rivals:
        print(f"peak memory ours / {name}: {peaks['ours'] / peaks[name]:.3f}")
    if ceilings:
        ceiling = statistics.median(ceilings)
        flops = warm["ours"]["flops"]
        print(
            f"matrix product ceiling {ceiling / 1e9:.0f} GFLOP/s (2048x2048x2048); our {flops / 1e9:.1f} GFLOP a step "
            f"need {flops / ceiling * 1e3:.0f} ms there: fraction {flops / ceiling / step['ours']:.3f}"
        )


if __name__ == "__main__":
    main()
