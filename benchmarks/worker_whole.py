"""The hand-written rivals of benchmarks/step.py: whole_step, where torch.compile takes forward, backward, clipping and
AdamW as one function, and module, where it takes the model, and apart from it clipping with the optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import contender
import llama_by_hand
import torch
from torch.utils import _pytree as pytree


def whole_step(spec: dict) -> Callable[[], float]:
    """One compiled function with fullgraph; the casts of weights stand once, before everything else."""
    params = pytree.tree_map(lambda p: p.to(spec["device"]), llama_by_hand.load(spec["theirs"]))
    flat, form = pytree.tree_flatten(params)
    first, second = ([torch.zeros_like(p) for p in flat] for _ in range(2))
    tokens, targets = contender.tokens_and_targets(spec)
    table = [x.to(spec["device"]) for x in llama_by_hand.rope_table(spec["seq"], spec["dim"] // spec["heads"])]
    dtype = torch.bfloat16 if spec["dtype"] == "bf16" else torch.float32
    b1, b2 = contender.BETAS

    def loss_of(weights: list[torch.Tensor]) -> torch.Tensor:
        return llama_by_hand.loss(pytree.tree_unflatten(weights, form), tokens, targets, table, spec)

    @torch.compile(fullgraph=True)
    def step(flat, first, second, count):
        grads, loss = torch.func.grad_and_value(loss_of)([p.to(dtype) for p in flat])
        grads = [g.float() for g in grads]
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        factor = torch.clamp(contender.CLIP / (norm + 1e-6), max=1.0)
        for p, g, m, v in zip(flat, grads, first, second, strict=True):
            g = g * factor
            m.mul_(b1).add_(g * (1 - b1))
            v.mul_(b2).add_(g * g * (1 - b2))
            update = (m / (1 - b1**count)) / ((v / (1 - b2**count)).sqrt() + contender.EPS)
            decay = contender.DECAY if p.dim() > 1 else 0.0
            p.sub_(contender.LR * (update + decay * p))
        return loss

    count = torch.zeros((), device=spec["device"])

    def run() -> float:
        count.add_(1)
        with torch.no_grad():
            return step(flat, first, second, count).item()

    return run


class Model(torch.nn.Module):
    """The same model, its parameters registered."""

    def __init__(self, spec: dict) -> None:
        super().__init__()
        flat, self.form = pytree.tree_flatten(llama_by_hand.load(spec["theirs"]))
        self.flat, self.spec = torch.nn.ParameterList(flat), spec
        table = llama_by_hand.rope_table(spec["seq"], spec["dim"] // spec["heads"])
        self.register_buffer("cos", table[0])
        self.register_buffer("sin", table[1])

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if self.spec["dtype"] == "bf16" else torch.float32
        weights = pytree.tree_unflatten([p.to(dtype) for p in self.flat], self.form)
        return llama_by_hand.loss(weights, tokens, targets, (self.cos, self.sin), self.spec)


def module(spec: dict) -> Callable[[], float]:
    """The model compiled with fullgraph, and clipping with AdamW compiled."""
    model = Model(spec).to(spec["device"])
    tokens, targets = contender.tokens_and_targets(spec)
    optimizer = contender.torch_adamw(model.parameters(), foreach=True)
    forward = torch.compile(model, fullgraph=True)

    @torch.compile
    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), contender.CLIP)
        optimizer.step()

    def run() -> float:
        loss = forward(tokens, targets)
        loss.backward()
        update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def main() -> None:
    spec = contender.spec()
    contender.prepare(spec["threads"])
    contender.serve({"whole_step": whole_step, "module": module}[spec["name"]](spec), spec["device"], {})


if __name__ == "__main__":
    main()
