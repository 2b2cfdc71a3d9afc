"""A plan as one HTML page with plots: memory over the step, roofline, communication by axis. Needs matplotlib."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from html import escape
from typing import Any

from llama_fn.ascend.budget import Budget, as_lines
from llama_fn.errors import UserError
from llama_fn.html import document, table
from llama_fn.planner import schedule_chart
from llama_fn.planner.plan import Plan
from llama_fn.planner.report import GB, verdict

COLOURS = {"forward": "#2f6fb2", "backward": "#d9731a", "optimizer": "#3f8f4f"}
BOUNDS = {"compute": "#2f6fb2", "memory": "#d9731a", "communication": "#9b3fa0"}


def page(plan: Plan, ge: tuple[Budget, str] | None = None) -> str:
    """`ge`: of ge_budget.py. UserError without matplotlib."""
    plt = _pyplot()
    h = plan.hardware
    facts = [
        ("parameters of the model", plan.parameters),
        ("peak of a device, GB", f"{plan.peak_bytes / GB:.1f}"),
        ("reserved for the runtime, GB", f"{plan.reserved_bytes / GB:.1f}: {h.reserved.source}"),
        ("memory of a device, GB", f"{h.hbm_bytes / GB:.0f}: the step {verdict(plan)}"),
        ("reached at", plan.peak_at),
        ("parameters, optimizer, gradients, GB", " + ".join(
            f"{size / GB:.2f}" for size in (plan.parameters_bytes, plan.optimizer_bytes, plan.gradients_bytes))),
        ("kept for the backward of a microbatch, GB", f"{plan.activations_bytes / GB:.2f}"),
        ("step, s", f"{plan.step_time_s:.3f} as simulated, {plan.one_stream_s:.3f} with one stream for all "
         f"collectives, {plan.step_time_alone_s:.3f} if no sending hides"),
        ("tokens/s of a device, MFU", f"{plan.tokens_per_second_per_device:,.0f}, {plan.mfu:.3f} as simulated"),
        ("FLOPs of a device", f"{plan.hardware_flops:.4g} in the graph, {plan.model_flops:.4g} of the model"),
    ]  # fmt: skip
    rows = [
        (r.count, r.kind, r.axis, r.dtype, r.bytes, round(t.seconds * 1e3, 2), r.phase, r.scope, r.source)
        for t in plan.transfers if (r := t.row)
    ]  # fmt: skip
    head = ("count", "kind", "axis", "dtype", "bytes each", "ms in all", "phase", "scope", "source")
    title = f"{plan.cfg.model.preset} on {plan.mesh}, rules {plan.cfg.mesh.rules}, {h.name}"
    parts = [
        table(("what", "predicted"), facts),
        *_schedule_parts(plt, plan),
        *(["<h2>Memory over the step</h2>", _image(plt, _memory, plan)] if plan.timeline else []),
        "<h2>What takes the time</h2>", _image(plt, _roofline, plan),
        "<h2>Over the wire</h2>", _image(plt, _wires, plan) + table(head, rows) if rows else "<p>nothing</p>",
        *_ge_parts(ge),
        f"<p>{escape(h.name)}: {escape(h.source)}</p>",
    ]  # fmt: skip
    return document(title, "".join(parts))


def _ge_parts(ge: tuple[Budget, str] | None) -> list[str]:
    if ge is None:
        return []
    lines, why = "\n".join(as_lines(ge[0])), ge[1]
    return ["<h2>GE graphs</h2>", f"<pre>{escape(lines)}\nbecause {escape(why)}</pre>"]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("the page has plots, for which matplotlib is missing: pip install 'llama_fn[viz]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _image(plt: Any, draw: Any, plan: Plan) -> str:
    figure, axes = plt.subplots(figsize=(11, 3.6), layout="constrained")
    draw(axes, plan)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=5, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)  # above, on no bar
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"<img style='max-width:100%' alt='{draw.__name__.strip('_')}' src='data:image/svg+xml;base64,{encoded}'>"


def _schedule_parts(plt: Any, plan: Plan) -> list[str]:
    """The schedule of a pipeline: the whole step, how it begins, and the stages in numbers."""
    made = plan.pipeline
    if made is None:
        return []
    rows = [
        (i, s.layers, f"{s.busy_s:.3f}", f"{s.idle_s:.3f}", f"{peak / GB:.2f}",
         f"{s.kept_bytes / GB:.2f}", s.peak_at)
        for i, (s, peak) in enumerate(zip(made.stages, plan.stage_peaks, strict=True))
    ]  # fmt: skip
    said = (
        f"{plan.cfg.mesh.schedule}: between the first and the last microbatch, stages are idle for "
        f"{made.timeline.bubble:.1%} of the time. Before the microbatches {made.before_s:.3f} s, after them "
        f"{made.after_s:.3f} s; a message takes {made.message_s * 1e3:.2f} ms. In the second picture lines are "
        "messages, numbers are microbatches."
    )
    head = ("stage", "layers", "s busy", "s idle", "peak GB", "kept for backwards GB", "the peak is at")
    return [
        "<h2>Stages over the step</h2>", f"<p>{escape(said)}</p>", _image(plt, schedule_chart.whole, plan),
        _image(plt, schedule_chart.beginning, plan), table(head, rows),
    ]  # fmt: skip


def _memory(axes: Any, plan: Plan) -> None:
    heights = [moment.bytes / GB for moment in plan.timeline]
    for phase, colour in COLOURS.items():
        at = [i for i, moment in enumerate(plan.timeline) if moment.phase == phase]
        axes.bar(at, [heights[i] for i in at], width=1, color=colour, label=phase)
    rest = (plan.parameters_bytes + plan.optimizer_bytes) / GB
    axes.axhline(rest, color="#1d2733", linewidth=0.8, linestyle=":")
    _beside(axes, rest, "parameters\nand optimizer")
    limit = (plan.hardware.hbm_bytes - plan.reserved_bytes) / GB
    if limit < 2.5 * max(heights):
        axes.axhline(limit, color="#c22", linewidth=1)
        _beside(axes, limit, f"{plan.hardware.name}, less\nwhat is reserved", color="#c22")
    axes.set(
        xlabel="parts of the step, in order (layers; of many microbatches three)", ylabel="GB", xlim=(-1, len(heights))
    )


def _beside(axes: Any, height: float, text: str, **kwargs: Any) -> None:
    """Words on a line, to the right of the axes and so of every bar."""
    axes.text(1.01, height, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, **kwargs)


def _roofline(axes: Any, plan: Plan) -> None:
    """The scopes that take longest, by what bounds them."""
    longest = sorted(plan.scopes, key=lambda p: -p.seconds)[:12][::-1]
    names = [f"{p.scope}, {p.phase}" for p in longest]
    times = [p.seconds for p in longest]
    axes.barh(names, times, color=[BOUNDS[p.bound] for p in longest])
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="s at the device's peaks", xlim=(0, None))
    for bound, colour in BOUNDS.items():
        axes.bar(0, 0, color=colour, label=f"bound by {bound}")


def _wires(axes: Any, plan: Plan) -> None:
    by_kind: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for t in plan.transfers:
        by_kind[t.row.kind][t.row.axis] += t.row.bytes * t.row.count / GB
    names = sorted({t.row.axis for t in plan.transfers})
    left = dict.fromkeys(names, 0.0)
    for kind, sizes in by_kind.items():
        axes.barh(names, [sizes[name] for name in names], left=[left[name] for name in names], label=kind)
        left = {name: left[name] + sizes[name] for name in names}
    axes.set(xlabel="GB that a device sends in a step, by mesh axis")
