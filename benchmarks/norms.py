"""What --run.norms_every costs: the update of a step with and without norms, in turns, beside the whole step.

    python benchmarks/norms.py --preset llama_60m --rounds 30

Norms are taken of what the optimizer has at hand, so the rest of a step is the same to the op, and what they take is
measured on the update alone: a whole step varies from turn to turn by more than that. The update gets the gradients of
each layer apart, as the backward gives them. Prints medians, and what norms add to a step; the floor is two passes over
the state, one that reads gradients, and one that reads new parameters and writes and reads updates.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from step_cells import BATCHES

from llama_fn import compat, tree
from llama_fn.compiler import stages
from llama_fn.config import Config, DataConfig, RunConfig
from llama_fn.model import arrays, llama, random, train_step, update, weights
from llama_fn.model.arrays import DTYPES, ArrayInfo
from llama_fn.model.presets import preset
from llama_fn.model.transforms import phase

CACHE = Path("~/.cache/llama_fn").expanduser()
Run = Callable[[], float]  # gives its seconds


def whole(cfg: Config) -> Run:
    """The step."""
    lowered = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg)).lower()
    step = lowered.compile("inductor", cache=CACHE)
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


def alone(cfg: Config) -> Run:
    """Its update, of gradients in the compute dtype that stay the same."""
    update_fn = update.make_update(cfg)

    def fn(state: Any, loss_sum: torch.Tensor, tokens: torch.Tensor, grads: llama.Params, hyper: Any) -> Any:
        with phase("optimizer"):
            params, opt_state, metrics = update_fn(*state, loss_sum, tokens, weights.stacked(grads), hyper)
        return (params, opt_state), metrics

    infos, scalar = llama.abstract_params(cfg.model), ArrayInfo((), torch.float32)
    compute = tree.map(lambda x: replace(x, dtype=DTYPES[cfg.model.compute_dtype]), infos)
    each = [tree.map(lambda x: replace(x, shape=x.shape[1:], axes=x.axes[1:]), compute.layers)] * cfg.model.num_layers
    declared = ((infos, update.abstract_opt_state(cfg)), scalar, scalar, replace(compute, layers=each))
    hyper = train_step.hyperparameters(cfg, "cpu")
    lowered = stages.jit(fn, donate=0).trace(*declared, hyper).lower()
    compiled = lowered.compile("inductor", cache=CACHE, outlined=False)
    held = [arrays.materialize(declared[0], random.key(0), "cpu")]
    grads = tree.map(lambda x: torch.full(x.shape, 1e-3, dtype=x.dtype), declared[3])
    tokens = torch.tensor(float(cfg.data.global_batch_size * cfg.data.seq_len))

    def run() -> float:
        began = time.perf_counter()
        held[0], metrics = compiled(held[0], 10 * tokens, tokens, grads, hyper)
        metrics["lm_loss"].item()
        return time.perf_counter() - began

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_tiny", choices=BATCHES)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    compat.keep_memory()  # as a run does
    batch, seq_len = BATCHES[args.preset]
    model = replace(preset(args.preset), compute_dtype=args.dtype)
    plain, asked = (
        Config(
            model, data=DataConfig(seq_len=seq_len, global_batch_size=batch), run=RunConfig(norms_every=n, steps=1000)
        )
        for n in (0, 100)
    )
    runs = [alone(plain), alone(asked), whole(plain)]
    for run in runs:
        run()
    seconds = [[run() for run in runs] for _ in range(args.rounds)]
    without, with_norms, step = (statistics.median(column) for column in zip(*seconds, strict=True))
    low, middle, high = statistics.quantiles([(b - a) / step for a, b, _ in seconds], n=4)
    print(f"update without norms {without * 1e3:.1f} ms, with {with_norms * 1e3:.1f} ms; a step {step * 1e3:.0f} ms")
    print(f"norms add {100 * middle:.2f} % to a step (quartiles {100 * low:.2f} to {100 * high:.2f})")


if __name__ == "__main__":
    main()
