"""What microbatches cost inductor, which compiles the body of a microbatch once: python benchmarks/microbatches.py

First, llama_tiny is compiled cold with few and with many microbatches, each in a process of its own with an empty
cache: seconds, bytes of machine code and bytes of generated text. Then a step with --steps-of microbatches is timed
against the same step with every microbatch written out, both compiled in one process and run in turn. Written out,
inductor adds up the gradients of all microbatches at the end: it reads them once, and holds all of them until then.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def compile_cold(microbatches: int, cache: Path) -> None:
    """Print the seconds from trace to compiled step, and the bytes of its code."""
    from llama_fn.planner import config_stages

    cfg = config(microbatches)
    start = time.perf_counter()
    step = config_stages.train(cfg).lower().compile("inductor", cache=cache)
    seconds = time.perf_counter() - start
    machine = sum(path.stat().st_size for path in cache.rglob("*.so"))
    print(seconds, machine, len(step.executable.code))


def config(microbatches: int, sequences: int = 1):  # type: ignore[no-untyped-def]
    """llama_tiny with so many microbatches, of so many sequences of 256 tokens each."""
    from llama_fn.config import Config
    from llama_fn.model.presets import preset

    cfg = Config(model=preset("llama_tiny"))
    return replace(cfg, data=replace(cfg.data, microbatches=microbatches, global_batch_size=microbatches * sequences))


def time_steps(microbatches: int, rounds: int, sequences: int) -> None:
    """Print the medians of a step of calls and of the same written out, and their ratio."""
    import torch

    from llama_fn import compat
    from llama_fn.compiler import calls
    from llama_fn.model import arrays, random, train_step
    from llama_fn.planner import config_stages

    compat.keep_memory()  # as train.py does
    cfg = config(microbatches, sequences)
    called = config_stages.train(cfg).lower()
    flat = replace(called, graph_module=calls.inlined(called.graph_module))
    batch = train_step.abstract_batch(cfg)
    ids = [torch.randint(cfg.model.vocab_size, batch.tokens.shape) for _ in range(2)]
    given = train_step.Batch(*ids, torch.ones(batch.loss_mask.shape)), train_step.hyperparameters(cfg)
    steps, states, seconds = {}, {}, {}
    for name, lowered in (("calls", called), ("written out", flat)):
        steps[name], seconds[name] = lowered.compile("inductor"), list[float]()
        states[name] = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
    for _ in range(rounds + 2):  # the first two warm up
        for name, step in steps.items():
            start = time.perf_counter()
            states[name], metrics = step(states[name], *given)
            metrics["lm_loss"].item()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each[2:]) for name, each in seconds.items()}
    for name, median in medians.items():
        print(f"step of {microbatches} microbatches, {name}: {median * 1e3:.1f} ms")
    print(f"speed of calls over written out: {medians['written out'] / medians['calls']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, nargs=2, default=[2, 64])
    parser.add_argument("--steps-of", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=4, help="of 256 tokens, in each of those microbatches")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cold", help=argparse.SUPPRESS)  # the folder of the cache; the first number is compiled
    args = parser.parse_args()
    if args.cold:
        compile_cold(args.microbatches[0], Path(args.cold))
        return
    rows = []
    for number in args.microbatches:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--cold", cache, "--microbatches", str(number), "0"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        rows.append((float(out[0]), int(out[1]), int(out[2])))
        print(f"{number} microbatches: {rows[-1][0]:.1f} s, {rows[-1][1]} bytes of machine code, {rows[-1][2]} of text")
    ratios = [many / few for few, many in zip(*rows, strict=True)]
    print("ratios: seconds {:.3f}, machine code {:.3f}, text {:.3f}".format(*ratios), flush=True)
    time_steps(args.steps_of, args.rounds, args.sequences)


if __name__ == "__main__":
    main()
