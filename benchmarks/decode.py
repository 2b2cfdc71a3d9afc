"""Greedy generation beside transformers' generate, of the same random weights: tokens/s and the bound of memory.

    python benchmarks/decode.py [--dtype bf16] [--batch 1]

The rivals are transformers with its growing cache, and with a static cache and its forward compiled whole
(fullgraph), which is what its documentation gives as the fastest. Each is a process of its own with the same threads
and allocator settings; they take turns in one run. A call reads a prompt of 32 tokens and generates 128. Its floor is
the time of reading the weights once for each token at the bandwidth that the run measures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import Contender

from llama_fn.tools import convert_in

HERE = Path(__file__).resolve().parent
RIVALS = ("transformers_eager", "transformers_compiled")


def contender(name: str, spec: dict[str, Any], folder: Path) -> Contender:
    script = HERE / ("worker_decode_ours.py" if name == "ours" else "worker_decode_transformers.py")
    return Contender(
        name, script, {**spec, "name": name}, folder, {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor_{name}")}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = {**vars(args), "theirs": str(folder / "theirs"), "ours": str(folder / "ours"), "prompt": 32}
        made = [sys.executable, "-P", str(HERE / "worker_decode_transformers.py"), json.dumps({**spec, "name": "make"})]
        subprocess.run(made, cwd=folder, check=True)
        convert_in.convert(folder / "theirs", folder / "ours", None)
        workers = [contender(name, spec, folder) for name in ("ours", *RIVALS)]
        answers = [worker.first["tokens"] for worker in workers]
        same = [answer == answers[0] for answer in answers[1:]]
        turns = [[worker.turn() for worker in workers] for _ in range(args.rounds)]
        for worker in workers:
            worker.close()
    print(f"llama_60m {args.dtype}, {args.batch} prompts of 32 tokens, {args.tokens} generated, {args.threads} threads")
    print(f"tokens equal to ours: {', '.join(f'{n} {s}' for n, s in zip(RIVALS, same, strict=True))}")
    medians = {}
    for i, worker in enumerate(workers):
        seconds = sorted(turn[i]["seconds"][0] for turn in turns)
        medians[worker.name] = statistics.median(seconds)
        rate = args.batch * args.tokens / medians[worker.name]
        spread = f"{seconds[0]:.3f} to {seconds[-1]:.3f} s"
        print(f"{worker.name:24}{rate:8.0f} tokens/s   {spread}   peak {turns[-1][i]['peak_bytes'] / 1e6:.0f} MB")
    print(f"ours / better rival: {min(medians[name] for name in RIVALS) / medians['ours']:.2f}")
    floor = args.tokens * workers[0].first["bytes"] / workers[0].first["bandwidth"]
    print(
        f"floor, weights read once a token at {workers[0].first['bandwidth'] / 1e9:.1f} GB/s: {floor:.3f} s; ours ",
        end="",
    )
    print(f"reaches {floor / medians['ours']:.2f} of it")


if __name__ == "__main__":
    main()
