"""What both workers of the step benchmark share: clock, allocator, turns on standard input, peak memory."""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable

START = time.perf_counter()

# The optimizer of every contender: AdamW, constant learning rate, decay of matrices only, clipping by global norm.
LR, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
FIRST_LOSSES = 3  # of these every contender must have the same


def spec() -> dict:
    return json.loads(sys.argv[1])


def prepare(threads: int) -> None:
    """Threads and the allocator settings that every contender gets."""
    import torch

    torch.set_num_threads(threads)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2**31 - 1)
    libc.mallopt(-1, 2**31 - 1)


def batch(vocab: int, size: int, seq: int, device: str):
    """The same random tokens for everyone: [size, seq + 1] int64."""
    import torch

    return torch.randint(0, vocab, (size, seq + 1), generator=torch.Generator().manual_seed(0)).to(device)


def tokens_and_targets(spec: dict):
    """[B, T] int64 each, of :func:`batch`."""
    tokens = batch(spec["vocab"], spec["batch"], spec["seq"], spec["device"])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def torch_adamw(parameters, **more):
    """torch's AdamW on a model's parameters."""
    import torch

    held = list(parameters)
    matrices, vectors = [p for p in held if p.dim() > 1], [p for p in held if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, **more)


def ceiling(dtype, device: str) -> float:
    """FLOP/s of a 2048 x 2048 x 2048 product into an existing result, in a torch dtype."""
    import torch

    a, b, c = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(3))
    torch.mm(a, b, out=c)
    best = min(_timed(lambda: torch.mm(a, b, out=c), device) for _ in range(3))
    return 2 * 2048**3 / best


def _timed(fn: Callable[[], object], device: str) -> float:
    import torch

    start = time.perf_counter()
    fn()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def serve(step: Callable[[], object], device: str, first: dict, extra: Callable[[], dict] = dict) -> None:
    """Run the first steps, say how long the first took since the process began, then answer turns until input ends."""
    import torch

    results = [step()]
    if device == "cuda":
        torch.cuda.synchronize()
    first_step = time.perf_counter() - START
    results += [step() for _ in range(FIRST_LOSSES - 1)]
    print(json.dumps({"first_step_s": first_step, "results": results, **first}), flush=True)
    for line in sys.stdin:
        seconds = [_timed(step, device) for _ in range(int(line))]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, **extra()}), flush=True)
