"""Is this machine ready to train on its Ascend NPUs? Says what is there and what is missing, then runs two real steps.

    python -m llama_fn.tools.check_npu

Exit status 0 where a compiled step on the NPU gives the loss of the same step run op by op on the CPU, else 1.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from absl import app
from absl import logging as absl_logging

from llama_fn.config import Config

TOLERANCE = 1e-3  # relative, float32 on both sides; the NPU may round products through hf32


def main(argv: list[str]) -> None:
    """Print what this machine has and lacks, compare two steps, and exit 0 or 1."""
    from llama_fn import config, config_checks
    from llama_fn.ascend import device, requirements
    from llama_fn.errors import UserError

    absl_logging.set_verbosity(absl_logging.WARNING)
    needed = list(requirements.on_this_machine())
    print(requirements.as_text(needed))
    if not all(r.there for r in needed):
        sys.exit(1)
    cfg = config.Config()
    cfg = config_checks.resolved(replace(cfg, run=replace(cfg.run, backend="npu"), data=replace(cfg.data, seq_len=128)))
    try:
        device.prepare(cfg.run)
        npu, cpu = losses(cfg, "npu"), losses(cfg, "cpu")
    except UserError as error:
        print(error)
        sys.exit(1)
    apart = max(abs(a - b) / abs(b) for a, b in zip(npu, cpu, strict=True))
    print(f"  two steps of {cfg.model.preset}: loss {npu} on the NPU, {cpu} on the CPU, {apart:.1e} apart")
    sys.exit(0 if apart <= TOLERANCE else 1)


def losses(cfg: Config, device: str) -> list[float]:
    """The loss of two steps on made-up tokens."""
    import torch

    from llama_fn import tree
    from llama_fn.compiler import stages
    from llama_fn.model import arrays, random, train_step

    step = stages.jit(train_step.make_train_step(cfg), donate=0)
    lowered = step.trace(*train_step.abstract_arguments(cfg)).lower()
    compiled = lowered.compile("npu") if device == "npu" else lowered.compile("eager")
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(0), device)
    ids = torch.arange(8 * 129).reshape(1, 8, 129) % cfg.model.vocab_size
    batch = train_step.Batch(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), torch.ones(1, 8, 128))
    inputs = tree.map(lambda x: x.to(device), (batch, train_step.hyperparameters(cfg)))
    per_step = []
    for _ in range(2):
        state, metrics = compiled(state, *inputs)
        per_step.append(metrics["lm_loss"].item())
    return per_step


if __name__ == "__main__":
    app.run(main)
