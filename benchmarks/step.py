"""Our compiled training step beside the fastest that others have: same weights, tokens and hyper-parameters.

    python benchmarks/step.py --preset=llama_60m --dtype=bf16
    python benchmarks/step.py --table=models --write=table.md

The rivals are
  whole_step              a LLaMA written by hand for speed, its whole step one function under torch.compile(fullgraph)
  module                  the same as a module under torch.compile, with compiled clipping and AdamW
  transformers_compiled   LlamaForCausalLM under torch.compile, torch's fused AdamW
  transformers_eager      the same without torch.compile
  jax                     the same step as one jitted function, where JAX is installed; only if asked for

Each is a process of its own with the same threads and allocator settings, which sets up once and runs a few steps
whenever it is its turn, so that all of them meet the same machine. The first losses of all are compared. fp32: float32
throughout. bf16: float32 parameters and moments, bfloat16 forward and backward.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from step_cells import BATCHES, DTYPES, Cell, tables
from step_report import Result, markdown, text
from turns import Contender

from llama_fn import tree
from llama_fn.checkpoint import layout
from llama_fn.checkpoint.weights import Weights
from llama_fn.model import llama
from llama_fn.tools import convert_in
from sharding import Mesh

HERE = Path(__file__).resolve().parent
WORKERS = {
    "ours": "worker_ours.py",
    "whole_step": "worker_whole.py",
    "module": "worker_whole.py",
    "transformers_compiled": "worker_transformers.py",
    "transformers_eager": "worker_transformers.py",
    "jax": "worker_jax.py",
}
ALWAYS = tuple(name for name in WORKERS if name != "jax")


def contender(name: str, spec: dict[str, Any], folder: Path) -> Contender:
    """In a folder of its own for caches. Inductor keeps precompiled headers under the temporary folder, whatever its
    cache folder is."""
    cache = folder / name
    cache.mkdir(exist_ok=True)
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TMPDIR": str(cache), "BENCH_CACHE": str(cache)}
    return Contender(name, HERE / WORKERS[name], {**spec, "name": name}, cache, folders)


def write_weights(checkpoint: Path, file: str) -> None:
    """Our parameters in one file, from which the worker reads them without the libraries of checkpoints: those would
    count as memory of its step."""
    weights = Weights(checkpoint, "--ours")
    infos = llama.abstract_params(weights.cfg)
    params = weights.load(infos, layout.parts(infos, None, Mesh(), 0), "cpu")
    save_file(tree.by_path(params), file, {"model": json.dumps(asdict(weights.cfg))})


def measured(cell: Cell, names: Sequence[str], rounds: int, steps: int, cold: bool, folder: Path) -> Result:
    """`rounds` turns of `steps` steps for each. `cold`: all of them start twice, the first time without a cache."""
    spec = {**cell.spec(), "theirs": str(folder / "theirs"), "ours": str(folder / "ours.safetensors")}
    made = [sys.executable, "-P", str(HERE / WORKERS["transformers_eager"]), json.dumps({**spec, "name": "make"})]
    subprocess.run(made, cwd=folder, check=True)
    convert_in.convert(folder / "theirs", folder / "checkpoint", None)
    write_weights(folder / "checkpoint", spec["ours"])
    starts: dict[str, list[float]] = {name: [] for name in names}
    if cold:
        for name in names:
            worker = contender(name, spec, folder)
            starts[name].append(worker.first["first_step_s"])
            worker.close()
    workers = [contender(name, spec, folder) for name in names]
    result = Result(cell, {worker.name: worker.first for worker in workers}, starts)
    for worker in workers:
        starts[worker.name].append(worker.first["first_step_s"])
    for done in range(rounds):
        for worker in workers:
            result.add(worker.name, worker.turn(steps))
        print(f"round {done + 1} of {rounds}", end="\r", file=sys.stderr, flush=True)
    for worker in workers:
        worker.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_tiny", choices=BATCHES)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    for name in ("batch", "seq", "heads", "kv_heads", "vocab", "layers"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--attention", default="auto", help="form of our attention kernel")
    parser.add_argument("--rounds", type=int, default=6, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=2, help="steps in one turn")
    parser.add_argument("--cold", action="store_true", help="also start everyone without a compile cache")
    parser.add_argument("--only", nargs="*", default=ALWAYS, choices=WORKERS)
    parser.add_argument("--table", choices=("models", "shapes"), help="all cells of a table instead of one")
    parser.add_argument("--write", type=Path, help="file for the results as Markdown")
    args = parser.parse_args()
    cell = Cell(**{field.name: getattr(args, field.name) for field in fields(Cell)})
    results = []
    for each in tables(cell)[args.table] if args.table else [cell]:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measured(each, args.only, args.rounds, args.steps, args.cold, Path(folder)))
        print(text(results[-1]), flush=True)
        if args.write:
            args.write.write_text(markdown(results))


if __name__ == "__main__":
    main()
