"""What --run.norms_every costs: the same step with and without norms, in turns.

    python benchmarks/norms.py --preset llama_60m --rounds 10

Prints both medians, and the quartiles of the ratio of neighbouring turns. The floor is one more pass over the state:
parameters, gradients and updates are read where the optimizer has them at hand.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from step_cells import BATCHES

from llama_fn.compiler import stages
from llama_fn.config import Config, DataConfig, RunConfig
from llama_fn.model import arrays, random, train_step
from llama_fn.model.presets import preset


def stepper(cfg: Config) -> Callable[[], float]:
    """Runs one step; gives its seconds."""
    lowered = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg)).lower()
    step = lowered.compile("inductor", cache=Path("~/.cache/llama_fn").expanduser())
    held = [arrays.materialize(train_step.abstract_state(cfg), random.key(0), "cpu")]
    shape = (1, cfg.data.global_batch_size, cfg.data.seq_len)
    tokens = torch.randint(0, cfg.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch, hyper = train_step.Batch(tokens, tokens, torch.ones(shape)), train_step.hyperparameters(cfg, "cpu")

    def run() -> float:
        began = time.perf_counter()
        held[0], metrics = step(held[0], batch, hyper)
        metrics["lm_loss"].item()
        return time.perf_counter() - began

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_tiny", choices=BATCHES)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    batch, seq_len = BATCHES[args.preset]
    data = DataConfig(seq_len=seq_len, global_batch_size=batch)
    runs = [
        stepper(Config(model=preset(args.preset), data=data, run=RunConfig(norms_every=every, steps=1000)))
        for every in (0, 100)
    ]
    for run in runs:
        run()
    seconds = [[run() for run in runs] for _ in range(args.rounds)]
    without, with_norms = (statistics.median(column) for column in zip(*seconds, strict=True))
    low, middle, high = statistics.quantiles([b / a for a, b in seconds], n=4)
    print(f"without norms {without * 1e3:.1f} ms, with {with_norms * 1e3:.1f} ms a step")
    print(f"with / without: {middle:.4f} (quartiles {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
