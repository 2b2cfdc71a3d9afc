"""Runs a step compiled for CUDA, its scopes named to a profiler, beside the eager one, on a CPU, and says how far apart
they are and which scopes have ranges.

    python tests/cuda/run_worker.py '{"dtype": "fp16", "microbatches": 2, "steps": 2}' OUT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import interpreter

interpreter.pretend()

import torch  # noqa: E402
from compile_worker import config_of  # noqa: E402

from kernels.scope_names import without_numbers  # noqa: E402
from llama_fn import tree  # noqa: E402
from llama_fn.compiler import cost, ir, stages  # noqa: E402
from llama_fn.config import Config  # noqa: E402
from llama_fn.hardware import TABLE  # noqa: E402
from llama_fn.inspect import profile_table  # noqa: E402
from llama_fn.inspect.profiling import Profiler  # noqa: E402
from llama_fn.model import arrays, random, train_step  # noqa: E402
from llama_fn.planner import config_stages  # noqa: E402


def ran(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    cfg = config_of({**job, "embed_dim": 32, "mlp_dim": 48, "num_layers": 2, "seq_len": 16})
    cfg = replace(cfg, run=replace(cfg.run, profile_steps="1:1", workdir=str(folder), device="cpu"))
    lowered = config_stages.train(cfg).lower()
    steps = {
        "cuda": on_cpu(lowered.compile("inductor", device="cuda", cache=None, profiled=True)),
        "eager": lowered.compile("eager"),
    }
    infos = train_step.abstract_state(cfg)
    states = {name: arrays.materialize(infos, random.key(0)) for name in steps}
    profiler = Profiler(cfg, 0, steps["cuda"], TABLE["h100"])
    metrics = {}
    for i in range(1, job["steps"] + 1):
        inputs = batch_of(cfg, i), train_step.hyperparameters(cfg)
        profiler.before(i)
        states["cuda"], values = steps["cuda"](states["cuda"], *inputs)
        profiler.after(i)
        states["eager"], expected = steps["eager"](states["eager"], *inputs)
        metrics = {name: [values[name].item(), expected[name].item()] for name in expected}
    pairs = zip(*map(tree.leaves, states.values()), strict=True)
    products = [node for node in ir.calls(lowered.graph_module.graph) if cost.flops_of(node)]
    events = json.loads(profiler.target.read_text())["traceEvents"]
    return {
        "metrics": metrics,
        "distances": {path: distance(*ab) for path, ab in zip(tree.paths(infos, "state"), pairs, strict=True)},
        "ranges": sorted(profile_table.of_trace(events, 1)),
        "products": sorted({(without_numbers(ir.scope_of(node)), ir.phase_of(node)) for node in products}),
    }


def on_cpu(compiled: stages.Compiled) -> stages.Compiled:
    """Code for a GPU that the interpreter runs: its arguments lie in CPU memory."""
    return replace(compiled, executable=replace(compiled.executable, device=None))


def batch_of(cfg: Config, seed: int) -> train_step.Batch:
    infos, generator = train_step.abstract_batch(cfg), torch.Generator().manual_seed(seed)
    shape, vocab = infos.tokens.shape, cfg.model.vocab_size
    tokens, targets = (torch.randint(0, vocab, shape, generator=generator) for _ in range(2))
    return train_step.Batch(tokens, targets, torch.ones(shape))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of a from b, by the norm of b."""
    a, b = a.double(), b.double()
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30)).item()


if __name__ == "__main__":
    out = Path(sys.argv[2])
    out.write_text(json.dumps(ran(json.loads(sys.argv[1]), out.parent), indent=1))
