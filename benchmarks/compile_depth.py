"""Time from trace to a compiled step, cold, for several depths of llama_tiny: python benchmarks/compile_depth.py

Each depth compiles in a process of its own with an empty cache; prints seconds and the ratio of the deepest to the
shallowest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import sys, time
from dataclasses import replace
from pathlib import Path
from llama_fn.compiler import stages
from llama_fn.config import Config
from llama_fn.model.presets import preset
from llama_fn.model import train_step
cfg = Config(model=replace(preset("llama_tiny"), num_layers=int(sys.argv[1]), compute_dtype=sys.argv[3]))
start = time.perf_counter()
traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg))
traced.lower().compile("inductor", cache=Path(sys.argv[2]))
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24])
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    args = parser.parse_args()
    seconds = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-c", CODE, str(layers), cache, args.dtype]
            out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        seconds[layers] = float(out.split()[-1])
        print(f"{layers} layers: {seconds[layers]:.1f} s", flush=True)
    print(f"ratio {seconds[args.layers[-1]] / seconds[args.layers[0]]:.3f}")


if __name__ == "__main__":
    main()
