"""How seconds and memory grow with what a run is made of: layers, microbatches, devices, parameters.

    python benchmarks/growth.py
    python benchmarks/growth.py --only=devices

Every point is a process of its own, which traces a bf16 step, lowers it, plans it and lays its checkpoint out, for
devices that do not exist. The exponent is the slope of seconds over size in logarithms, of the larger half of the
points: 0 does not grow, 1 grows as the size does. Memory is the peak of the process, of which torch alone is 0.3 GiB.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARTS = ("trace", "lower", "plan", "checkpoint")
LARGE = {"preset": "llama_65b", "mesh": "data:12,model:8", "microbatches": 1, "layers": None}
POINTS: Mapping[str, Sequence[tuple[int, dict[str, Any]]]] = {
    "layers": [(n, {**LARGE, "layers": n}) for n in (2, 8, 24, 48, 96)],
    "microbatches": [(n, {**LARGE, "microbatches": n}) for n in (1, 4, 16, 64, 256)],
    "devices": [(n, {**LARGE, "mesh": f"data:{n // 8},model:8"}) for n in (8, 64, 512, 4096, 16384)],
    "million parameters": [
        (size, {**LARGE, "preset": f"llama_{name}", "mesh": ""})
        for size, name in ((5, "tiny"), (60, "60m"), (1300, "1b"), (7000, "7b"), (33000, "33b"), (65000, "65b"))
    ],
}  # fmt: skip


def one(point: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part, and GiB, in this process."""
    from llama_fn.checkpoint import layout
    from llama_fn.config import Config, DataConfig, MeshConfig
    from llama_fn.hardware import named
    from llama_fn.model import train_step
    from llama_fn.model.presets import preset
    from llama_fn.planner import config_stages, plan

    model = replace(preset(point["preset"]), compute_dtype="bf16")
    model = replace(model, num_layers=point["layers"] or model.num_layers)
    mesh = MeshConfig(axes=point["mesh"], rules="fsdp_tp" if point["mesh"] else "dp")
    rows = point["microbatches"] * dict(config_stages.mesh(Config(mesh=mesh)).axes).get("data", 1)
    data = DataConfig(seq_len=2048, global_batch_size=rows, microbatches=point["microbatches"])
    cfg = Config(model=model, data=data, mesh=mesh)
    devices, hardware = config_stages.mesh(cfg), named("ascend_910b1", "bf16")
    seconds, began = {}, time.perf_counter()

    def done(part: str) -> None:
        nonlocal began
        seconds[part], began = time.perf_counter() - began, time.perf_counter()

    traced = config_stages.train(cfg)
    done("trace")
    lowered = config_stages.lower(traced, cfg, devices)
    done("lower")
    plan.make(cfg, devices, hardware)
    done("plan")
    layout.stored(train_step.abstract_state(cfg), lowered.layouts_of("state"), devices, 0)
    done("checkpoint")
    return {**seconds, "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log value over log size, by least squares over the larger half of the points."""
    half = len(sizes) // 2
    xs, ys = ([math.log(v) for v in column[half:]] for column in (sizes, values))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=POINTS, default=list(POINTS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return
    for name in args.only:
        print(f"\n| {name} | {' | '.join(f'{part} s' for part in PARTS)} | peak GiB |\n| ---: |{' ---: |' * 5}")
        rows = []
        for size, point in POINTS[name]:
            command = [sys.executable, __file__, "--one", json.dumps(point)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
            cells = [f"{rows[-1][part]:.2f}" for part in (*PARTS, "GiB")]
            print(f"| {size:,} | {' | '.join(cells)} |", flush=True)
        sizes = [size for size, _ in POINTS[name]]
        slopes = [f"{exponent(sizes, [row[part] for row in rows]):.2f}" for part in (*PARTS, "GiB")]
        print(f"| exponent | {' | '.join(slopes)} |", flush=True)


if __name__ == "__main__":
    main()
