"""Will it fit, how fast can it be, and what goes over the wire? Answers from the step's graph, on any laptop.

    python -m llama_fn.tools.plan --flagfile=configs/llama_65b_96npu.flags
    python -m llama_fn.tools.plan --model.preset=llama_7b --mesh.axes=data:8 --hardware=h100 --json=plan.json

Takes train.py's flags. Nothing is allocated and no process group is made. Exit status 0 where the predicted peak fits
the device's memory, 1 where it does not, 2 for wrong input. How the numbers are made: llama_fn/plan.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_fn import config
from llama_fn.errors import UserError
from llama_fn.files import atomic
from llama_fn.tools import config_flags

FLAGS = flags.FLAGS
GB = 1e9


def as_json(found: Any) -> dict[str, Any]:
    """The keys that other programs may rely on; bytes, FLOPs and seconds are per device and step."""
    return {
        "devices": found.mesh.size,
        "mesh": str(found.mesh),
        "rules": found.cfg.mesh.rules,
        "hardware": found.hardware.name,
        "parameters": found.parameters,
        "parameters_bytes": found.parameters_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "gradients_bytes": found.gradients_bytes,
        "activations_bytes": found.activations_bytes,
        "peak_bytes": found.peak_bytes,
        "peak_at": found.peak_at,
        "fits": found.fits,
        "timeline": [asdict(moment) for moment in found.timeline],
        "model_flops": found.model_flops,
        "hardware_flops": found.hardware_flops,
        "compute_s": found.compute_s,
        "communication_s": found.comms_s,
        "step_time_s": found.step_time_s,
        "step_time_without_overlap_s": found.step_time_alone_s,
        "tokens_per_second_per_device": found.tokens_per_second_per_device,
        "mfu": found.mfu,
        "collectives": [asdict(t.row) | {"seconds": t.seconds} for t in found.transfers],
        "scopes": [asdict(p) | {"bound": p.bound} for p in found.places],
        "planning_s": found.seconds,
    }


def as_text(found: Any) -> str:
    from sharding import table

    h = found.hardware
    verdict = "fits" if found.fits else "DOES NOT FIT"
    lines = [
        f"{found.cfg.model.preset}, {found.parameters:,} parameters, {found.cfg.model.compute_dtype}, batch "
        f"{found.cfg.data.global_batch_size} x {found.cfg.data.seq_len} in {found.cfg.data.microbatches} microbatches",
        f"{found.mesh} ({found.mesh.size} devices), rules {found.cfg.mesh.rules}, {h.name}: {h.source}",
        "",
        "memory per device, GB",
        f"  parameters   {found.parameters_bytes / GB:9.3f}",
        f"  optimizer    {found.optimizer_bytes / GB:9.3f}",
        f"  gradients    {found.gradients_bytes / GB:9.3f}  once reduced",
        f"  activations  {found.activations_bytes / GB:9.3f}  saved for the backward",
        f"  peak         {found.peak_bytes / GB:9.3f}  of {h.hbm_bytes / GB:.0f}: {verdict}; at {found.peak_at}",
        f"  over the step {_sparkline([moment.bytes for moment in found.timeline])}",
        "",
        "per device and step",
        f"  FLOPs        {found.hardware_flops:.4e} in the graph, {found.model_flops:.4e} of the model (for MFU)",
        f"  computing    {found.compute_s:9.3f} s at least, pointwise ops unfused",
        f"  sending      {found.comms_s:9.3f} s",
        f"  step         {found.step_time_s:9.3f} s if one hides the other, {found.step_time_alone_s:.3f} s if not",
        f"  tokens/s     {found.tokens_per_second_per_device:9.1f}, MFU {found.mfu:.3f}, when hidden",
        "",
        *_roofline(found),
        "",
    ]
    rows = [t.row for t in found.transfers]
    if rows:
        lines += [table.as_text(rows), *_by_axis(found), ""]
    return "\n".join([*lines, f"planned in {found.seconds:.1f} s"])


def _roofline(found: Any) -> list[str]:
    """The scopes that take longest, with what bounds them."""
    head = f"{'ms compute':>11} {'ms memory':>11} {'ms sending':>11}  {'bound':13}  {'phase':9}  scope"
    longest = sorted(found.places, key=lambda p: -max(p.math_s, p.memory_s, p.comms_s))[:15]
    return [head] + [
        f"{p.math_s * 1e3:11.2f} {p.memory_s * 1e3:11.2f} {p.comms_s * 1e3:11.2f}  {p.bound:13}  {p.phase:9}  {p.scope}"
        for p in longest
    ]


def _by_axis(found: Any) -> list[str]:
    totals: dict[str, float] = {}
    for t in found.transfers:
        totals[t.row.axis] = totals.get(t.row.axis, 0.0) + t.seconds
    return [f"time over {axis}: {seconds:.3f} s" for axis, seconds in totals.items()]


def _sparkline(values: list[int]) -> str:
    top = max(values, default=1)
    wide = [max(values[i * len(values) // 60 : (i + 1) * len(values) // 60 + 1]) for i in range(60)] if values else []
    return "".join("▁▂▃▄▅▆▇█"[min(7, v * 8 // (top + 1))] for v in wide)


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; flags are written --section.name=value")
        cfg = config.validate(config_flags.build_config())
        from llama_fn import hardware, plan, rungs

        found = plan.make(cfg, rungs.mesh(cfg), hardware.named(FLAGS.hardware, cfg.model.compute_dtype))
        print(as_text(found))
        if FLAGS.json:
            with atomic(Path(FLAGS.json)) as f:
                json.dump(as_json(found), f, indent=1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if found.fits else 1)


if __name__ == "__main__":
    config_flags.define_flags()
    flags.adopt_module_key_flags(config_flags)
    flags.DEFINE_string("hardware", "ascend_910b1", "device of llama_fn/hardware.py to plan for")
    flags.DEFINE_string("json", "", "file that gets everything as JSON as well")
    app.run(main, flags_parser=config_flags.parse)
