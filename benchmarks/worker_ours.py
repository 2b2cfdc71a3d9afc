"""Our side of benchmarks/step.py."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import contender  # noqa: E402


def main() -> None:
    spec = contender.spec()
    import torch

    from llama_fn import tree
    from llama_fn.compiler import stages
    from llama_fn.config import Config, DataConfig, RunConfig
    from llama_fn.model import arrays, random, train_step
    from llama_fn.model.presets import preset

    contender.prepare(spec["threads"])
    model = replace(preset(spec["preset"]), compute_dtype=spec["dtype"])
    data = DataConfig(seq_len=spec["seq"], global_batch_size=spec["batch"])
    cfg = Config(model=model, data=data, run=RunConfig(steps=1000))
    traced = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg))
    lowered = traced.lower()
    step = lowered.compile(
        "inductor", device=spec["device"], attention=spec["attention"], cache=Path(os.environ["BENCH_CACHE"]) / "ours"
    )
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(0), spec["device"])
    tokens = contender.batch(model.vocab_size, spec["batch"], spec["seq"], spec["device"])[None]
    mask = torch.ones(tokens[..., 1:].shape, device=spec["device"])
    batch = train_step.Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), mask)
    hyper = train_step.hyperparameters(cfg, spec["device"])
    held = [state]

    def run() -> None:
        held[0], metrics = step(held[0], batch, hyper)
        metrics["lm_loss"].item()

    first = {"flops": lowered.cost_analysis().total_flops, "from_cache": step.from_cache}
    contender.serve(
        run,
        spec["device"],
        {**first, "leaves": len(tree.leaves(state))},
        lambda: {"ceiling_flops_per_s": contender.ceiling(spec["dtype"], spec["device"])},
    )


if __name__ == "__main__":
    main()
