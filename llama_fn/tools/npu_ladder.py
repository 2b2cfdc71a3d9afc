"""The ladder of check_npu --graphs: steps of one device, from tiny to layers of LLaMA-65B. What can be seen of each
without a device, what is predicted, and what a device says to it."""

from __future__ import annotations

import functools
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama_fn import hardware, tree
from llama_fn.compiler import stages
from llama_fn.compiler.backends.ge_choice import choose
from llama_fn.compiler.backends.ge_counts import counted
from llama_fn.config import Config, DataConfig
from llama_fn.errors import UserError, nearest
from llama_fn.hardware import Hardware
from llama_fn.inspect import dump
from llama_fn.model import arrays, presets, random, train_step
from llama_fn.planner import config_stages, plan
from sharding import Mesh

STEPS = 6  # of which the first compiles
# (preset, layers, dtype, sequence, batch, whether the CPU can say what is right). The last two fit 64 GB with AdamW.
LADDER = {
    "tiny": ("llama_tiny", 4, "fp32", 128, 8, True),
    "60m": ("llama_60m", 8, "fp32", 256, 2, True),
    "1b": ("llama_1b", 22, "bf16", 2048, 1, False),
    "7b_8layers": ("llama_7b", 8, "bf16", 4096, 1, False),
    "65b_2layers": ("llama_65b", 2, "bf16", 4096, 1, False),
}


@dataclass(frozen=True)
class Rung:
    """A step, lowered for one device."""

    name: str
    cfg: Config
    lowered: stages.Lowered
    on_cpu_too: bool


def rungs(names: Sequence[str]) -> list[Rung]:
    """By name, in that order; UserError with the nearest name for an unknown one."""
    made = []
    for name in names:
        if name not in LADDER:
            raise UserError(f"--ladder={name} is no step of the ladder. {nearest(name, LADDER)}")
        preset, layers, dtype, length, batch, on_cpu_too = LADDER[name]
        cfg = config(preset, layers, dtype, length, batch)
        made.append(Rung(name, cfg, config_stages.lower(config_stages.train(cfg), cfg, Mesh()), on_cpu_too))
    return made


def config(preset: str, layers: int, dtype: Any, length: int, batch: int) -> Config:
    """Of one device."""
    model = replace(presets.preset(preset), num_layers=layers, compute_dtype=dtype)
    return Config(model=model, data=DataConfig(seq_len=length, global_batch_size=batch))


def predicted(rung: Rung, device: Hardware) -> dict[str, Any]:
    """Seconds of a step and of compiling it, and bytes at the peak, for `device`."""
    made, (budget, _) = plan.make(rung.cfg, Mesh(), device), choose(counted(rung.lowered.graph_module), "whole")
    return {
        "step_s": made.step_time_s, "compile_s": budget.compile_s, "peak_bytes": made.peak_bytes,
        "ops": budget.total, "streams": budget.streams("HOST"), "tokens_per_s": made.tokens_per_second_per_device,
    }  # fmt: skip


def converted(rung: Rung, folder: Path | None, device: str = "npu:0") -> stages.Compiled:
    """The step as a GE graph, which is written into `folder`, if there is one."""
    write = functools.partial(dump.write_ge, folder) if folder else None
    return rung.lowered.compile("npu", device=device, form="whole", write=write)


def atc(folder: Path, soc: str = "Ascend910B1") -> str:
    """CANN's command that compiles the graph in `folder` without a device, in our order of ops (3: StableRDFS)."""
    words = ["atc", "--framework=1", f"--model={folder / dump.GE_AIR}", f"--output={folder / 'compiled'}"]
    return shlex.join([*words, f"--soc_version={soc}", "--topo_sorting_mode=3"])


def rates(device: str, side: int = 8192, elements: int = 2**28) -> dict[str, float]:
    """What the device reaches: products in bf16, and copies of a GB."""
    products, copies = hardware.rates(device, "bf16", side, elements)
    return {"matmul_flops_per_s": products, "hbm_bytes_per_s": copies}


def as_line(row: dict[str, Any]) -> str:
    """For people: what was predicted, and what was measured if anything was."""
    p, m = row["predicted"], row["measured"]
    told = (
        f"  {row['name']:12} {p['ops']:6,} ops; predicted: compiled in {p['compile_s']:.0f} s, "
        f"{p['step_s'] * 1e3:.1f} ms a step, {p['peak_bytes'] / 1e9:.2f} GB"
    )
    if m is None:
        return told
    peak = f", {m['peak_bytes'] / 1e9:.2f} GB" if m["peak_bytes"] is not None else ""
    apart = f"; losses {m['losses']}, {m['apart']:.1e} from the CPU's" if m["apart"] is not None else ""
    return f"{told}; measured: {m['compile_s']:.0f} s, {m['step_s'] * 1e3:.1f} ms{peak}{apart}"


def measured(rung: Rung, compiled: stages.Compiled, device: str) -> dict[str, Any]:
    """What the step took on `device`: seconds to the end of the first, seconds of a later one (median), bytes at the
    peak; and of two steps the losses, beside the CPU's where it can say."""
    torch_device = torch.get_device_module(torch.device(device).type)
    getattr(torch_device, "reset_peak_memory_stats", lambda: None)()
    losses, seconds = _losses(rung.cfg, compiled, device, torch_device.synchronize)
    peak = getattr(torch_device, "max_memory_allocated", lambda: None)()
    found = {
        "compile_s": seconds[0], "step_s": statistics.median(seconds[1:]), "peak_bytes": peak,
        "losses": losses[:2], "losses_on_cpu": None, "apart": None,
    }  # fmt: skip
    if rung.on_cpu_too:
        right, _ = _losses(rung.cfg, rung.lowered.compile("eager"), "cpu", lambda: None, steps=2)
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses, right, strict=False))
        found |= {"losses_on_cpu": right, "apart": apart}
    return found


def _losses(
    cfg: Config, compiled: stages.Compiled, device: str, synchronize: Any, steps: int = STEPS
) -> tuple[list[float], list[float]]:
    """Loss and seconds of each step, on made-up tokens."""
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(0), device)
    length, size = cfg.data.seq_len, cfg.data.global_batch_size
    ids = torch.arange(size * (length + 1)).reshape(1, size, length + 1) % cfg.model.vocab_size
    batch = train_step.Batch(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), torch.ones(1, size, length))
    inputs = tree.map(lambda x: x.to(device), (batch, train_step.hyperparameters(cfg)))
    losses, seconds = [], []
    for _ in range(steps):
        synchronize()
        began = time.perf_counter()
        state, metrics = compiled(state, *inputs)
        losses.append(metrics["lm_loss"].item())  # which waits for the step
        seconds.append(time.perf_counter() - began)
    return losses, seconds
