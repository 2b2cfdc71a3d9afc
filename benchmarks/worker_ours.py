"""Our side of benchmarks/step.py."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import contender  # noqa: E402


def main() -> None:
    spec = contender.spec()
    import torch
    from safetensors import safe_open

    from llama_fn import compat, tree
    from llama_fn.compiler import stages
    from llama_fn.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
    from llama_fn.model import arrays, llama, random, train_step
    from llama_fn.model.arrays import DTYPES

    contender.prepare(spec["threads"])
    with safe_open(spec["ours"], "pt") as file:
        model = replace(ModelConfig(**json.loads(file.metadata()["model"])), compute_dtype=spec["dtype"])
    data = DataConfig(seq_len=spec["seq"], global_batch_size=spec["batch"])
    optim = OptimConfig(lr=contender.LR, schedule="constant", clip=contender.CLIP, weight_decay=contender.DECAY)
    cfg = Config(model=model, data=data, optim=optim, run=RunConfig(steps=1000))
    lowered = stages.jit(train_step.make_train_step(cfg), donate=0).trace(*train_step.abstract_arguments(cfg)).lower()
    step = lowered.compile(
        "inductor", device=spec["device"], attention=spec["attention"], cache=Path(os.environ["BENCH_CACHE"]) / "ours"
    )
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(0), spec["device"])
    with safe_open(spec["ours"], "pt", device=spec["device"]) as file:
        infos = llama.abstract_params(model)
        state = replace(state, params=tree.map_with_path(lambda path, _: file.get_tensor(path).clone(), infos))
    tokens, targets = (x[None] for x in contender.tokens_and_targets(spec))
    batch = train_step.Batch(tokens, targets, torch.ones(targets.shape, device=spec["device"]))
    hyper = train_step.hyperparameters(cfg, spec["device"])
    held = [state]

    def run() -> float:
        held[0], metrics = step(held[0], batch, hyper)
        return metrics["lm_loss"].item()

    first = {"flops": lowered.cost_analysis().total_flops, "from_cache": step.from_cache}
    dtype = DTYPES[spec["dtype"]]
    fastest = torch.float32 if spec["device"] == "cpu" and dtype in compat.slow_products() else dtype
    ceiling = lambda: {"ceiling_flops_per_s": contender.ceiling(fastest, spec["device"])}  # noqa: E731
    contender.serve(run, spec["device"], first, ceiling)


if __name__ == "__main__":
    main()
