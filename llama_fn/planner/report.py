"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llama_fn.planner.plan import Plan
from sharding import table

GB = 1e9


def as_json(found: Plan) -> dict[str, Any]:
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


def as_text(found: Plan) -> str:
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


def _roofline(found: Plan) -> list[str]:
    """The scopes that take longest, with what bounds them."""
    head = f"{'ms compute':>11} {'ms memory':>11} {'ms sending':>11}  {'bound':13}  {'phase':9}  scope"
    longest = sorted(found.places, key=lambda p: -p.seconds)[:15]
    return [head] + [
        f"{p.math_s * 1e3:11.2f} {p.memory_s * 1e3:11.2f} {p.comms_s * 1e3:11.2f}  {p.bound:13}  {p.phase:9}  {p.scope}"
        for p in longest
    ]


def _by_axis(found: Plan) -> list[str]:
    totals: dict[str, float] = {}
    for t in found.transfers:
        totals[t.row.axis] = totals.get(t.row.axis, 0.0) + t.seconds
    return [f"time over {axis}: {seconds:.3f} s" for axis, seconds in totals.items()]


def _sparkline(values: list[int]) -> str:
    top = max(values, default=1)
    wide = [max(values[i * len(values) // 60 : (i + 1) * len(values) // 60 + 1]) for i in range(60)] if values else []
    return "".join("▁▂▃▄▅▆▇█"[min(7, v * 8 // (top + 1))] for v in wide)
