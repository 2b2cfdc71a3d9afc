"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llama_fn.ascend import budget
from llama_fn.ascend.budget import Budget
from llama_fn.planner.plan import Plan
from sharding import collectives_table

GB = 1e9


def as_json(plan: Plan, ge: tuple[Budget, str] | None = None) -> dict[str, Any]:
    """The keys that other programs may rely on; bytes, FLOPs and seconds are per device and step. `ge`: of
    ge_budget.py."""
    return {
        "devices": plan.mesh.size,
        "mesh": str(plan.mesh),
        "rules": plan.cfg.mesh.rules,
        "hardware": plan.hardware.name,
        "parameters": plan.parameters,
        "parameters_bytes": plan.parameters_bytes,
        "optimizer_bytes": plan.optimizer_bytes,
        "gradients_bytes": plan.gradients_bytes,
        "activations_bytes": plan.activations_bytes,
        "peak_bytes": plan.peak_bytes,
        "peak_at": plan.peak_at,
        "reserved_bytes": plan.reserved_bytes,
        "spare_bytes": plan.spare_bytes,
        "fits": plan.fits,
        "timeline": [asdict(moment) for moment in plan.timeline],
        "model_flops": plan.model_flops,
        "hardware_flops": plan.hardware_flops,
        "compute_s": plan.compute_s,
        "communication_s": plan.comms_s,
        "step_time_s": plan.step_time_s,
        "step_time_on_one_stream_s": plan.one_stream_s,
        "step_time_without_overlap_s": plan.step_time_alone_s,
        "tokens_per_second_per_device": plan.tokens_per_second_per_device,
        "mfu": plan.mfu,
        "collectives": [asdict(t.row) | {"seconds": t.seconds} for t in plan.transfers],
        "scopes": [asdict(p) | {"bound": p.bound} for p in plan.scopes],
        "planning_s": plan.seconds,
        "pipeline": _pipeline_json(plan),
        "ge": budget.as_json(*ge) if ge else None,
    }


def _pipeline_json(plan: Plan) -> dict[str, Any] | None:
    """Of every stage; None without a pipeline."""
    made = plan.pipeline
    if made is None:
        return None
    return {
        "schedule": plan.cfg.mesh.schedule, "chunks": plan.cfg.mesh.chunks, "bubble": made.timeline.bubble,
        "imbalance": made.imbalance, "before_s": made.before_s, "after_s": made.after_s, "message_s": made.message_s,
        "stages": [asdict(stage) for stage in made.stages],
    }  # fmt: skip


def as_text(plan: Plan, ge: tuple[Budget, str] | None = None) -> str:
    """The plan as the tool prints it; `ge`: of ge_budget.py."""
    h = plan.hardware
    lines = [
        f"{plan.cfg.model.preset}, {plan.parameters:,} parameters, {plan.cfg.model.compute_dtype}, batch "
        f"{plan.cfg.data.global_batch_size} x {plan.cfg.data.seq_len} in {plan.cfg.data.microbatches} microbatches",
        f"{plan.mesh} ({plan.mesh.size} devices), rules {plan.cfg.mesh.rules}, {h.name}: {h.source}",
        "",
        "memory per device, GB",
        f"  parameters   {plan.parameters_bytes / GB:9.3f}",
        f"  optimizer    {plan.optimizer_bytes / GB:9.3f}",
        f"  gradients    {plan.gradients_bytes / GB:9.3f}  once reduced",
        f"  activations  {plan.activations_bytes / GB:9.3f}  saved for the backward",
        f"  peak         {plan.peak_bytes / GB:9.3f}  at {plan.peak_at}",
        f"  reserved     {plan.reserved_bytes / GB:9.3f}  {h.reserved.source}",
        f"  device       {h.hbm_bytes / GB:9.3f}  the step {verdict(plan)}",
        *([f"  over the step {_sparkline([moment.bytes for moment in plan.timeline])}"] if plan.timeline else []),
        "",
        "per device and step",
        f"  FLOPs        {plan.hardware_flops:.4e} in the graph, {plan.model_flops:.4e} of the model (for MFU)",
        f"  computing    {plan.compute_s:9.3f} s at least, pointwise ops unfused",
        f"  sending      {plan.comms_s:9.3f} s",
        f"  step         {plan.step_time_s:9.3f} s as simulated, {plan.one_stream_s:.3f} s with one stream for all "
        f"collectives, {plan.step_time_alone_s:.3f} s if no sending hides behind computing",
        f"  tokens/s     {plan.tokens_per_second_per_device:9.1f}, MFU {plan.mfu:.3f}, as simulated",
        "",
        *_pipeline(plan),
        *_roofline(plan),
        "",
    ]
    rows = [t.row for t in plan.transfers]
    if rows:
        lines += [collectives_table.as_text(rows), *_by_axis(plan), ""]
    if ge is not None:
        lines += [*budget.as_lines(ge[0]), f"because {ge[1]}", ""]
    return "\n".join([*lines, f"planned in {plan.seconds:.1f} s"])


def _pipeline(plan: Plan) -> list[str]:
    """A line for each stage, and what the schedule costs."""
    made, m = plan.pipeline, plan.cfg.mesh
    if made is None:
        return []
    head = f"{'stage':>5} {'layers':>6} {'s busy':>8} {'s idle':>8} {'peak GB':>8} {'kept GB':>8}  the peak is at"
    chunks = f", {m.chunks} chunks" if m.chunks > 1 else ""
    return [
        f"pipeline: {m.schedule}{chunks}, bubble {made.timeline.bubble:.3f}, the slowest stage {made.imbalance:.1%} "
        f"above the mean; {made.before_s:.3f} s before the microbatches, {made.after_s:.3f} s after; a message "
        f"{made.message_s * 1e3:.2f} ms",
        head,
        *(
            f"{i:5} {s.layers:6} {s.busy_s:8.3f} {s.idle_s:8.3f} {peak / GB:8.2f} {s.kept_bytes / GB:8.2f}  {s.peak_at}"
            for i, (s, peak) in enumerate(zip(made.stages, plan.stage_peaks, strict=True))
        ),
        "",
        f"of stage {made.slowest}, the slowest:",
    ]


def verdict(plan: Plan) -> str:
    """ "fits with 8.0 GB to spare", or how much is missing."""
    if plan.fits:
        return f"fits with {plan.spare_bytes / GB:.1f} GB to spare"
    return f"DOES NOT FIT: {-plan.spare_bytes / GB:.1f} GB are missing"


def _roofline(plan: Plan) -> list[str]:
    """The scopes that take longest, with what bounds them."""
    head = f"{'ms compute':>11} {'ms memory':>11} {'ms sending':>11}  {'bound':13}  {'phase':9}  scope"
    longest = sorted(plan.scopes, key=lambda p: -p.seconds)[:15]
    return [head] + [
        f"{p.math_s * 1e3:11.2f} {p.memory_s * 1e3:11.2f} {p.comms_s * 1e3:11.2f}  {p.bound:13}  {p.phase:9}  {p.scope}"
        for p in longest
    ]


def _by_axis(plan: Plan) -> list[str]:
    totals: dict[str, float] = {}
    for t in plan.transfers:
        totals[t.row.axis] = totals.get(t.row.axis, 0.0) + t.seconds
    return [f"time over {axis}: {seconds:.3f} s" for axis, seconds in totals.items()]


def _sparkline(values: list[int]) -> str:
    top = max(values, default=1)
    upcast = [max(values[i * len(values) // 60 : (i + 1) * len(values) // 60 + 1]) for i in range(60)] if values else []
    return "".join("▁▂▃▄▅▆▇█"[min(7, v * 8 // (top + 1))] for v in upcast)
