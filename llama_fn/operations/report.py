"""One page about one run or several side by side, complete in itself: nothing is loaded, and nothing runs in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from llama_fn import html
from llama_fn.files import atomic
from llama_fn.operations import svg
from llama_fn.operations.attempts import Attempt
from llama_fn.operations.facts import Facts
from llama_fn.operations.state import duration

FILE = "report.html"
STYLE = """<style>
svg { display: block; margin: .4em 0 } pre { background: #eef2f6; padding: .6em; white-space: pre-wrap; margin: .3em 0 }
.legend span { margin-right: 1.2em; display: inline-block; font-size: .85em }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20em, 1fr)); gap: 1em }
h3 { font-size: 1em; margin: 1em 0 .2em } @media (max-width: 40em) { body { margin: 1em auto; font-size: 14px } }
</style>"""
ENDED = {0: "#15803d", 5: "#a16207", 6: "#a16207"}  # by exit status
PART_COLORS = {
    "step": "#15803d", "lost": "#b91c1c", "idle": "#94a3b8", "compile": "#0b5cad", "restore": "#0e7490",
    "prepare": "#7e22ce", "data": "#c2410c", "save": "#a16207", "evaluate": "#65a30d", "other": "#475569",
}  # fmt: skip
CHARTS = (
    ("learning rate", "learning_rate"), ("gradient norm", "grad_norm"),
    ("tokens per second", "tokens_per_second"), ("step, ms", "step_time_ms"),
    ("waiting for data, ms", "data_wait_ms"), ("model FLOPs utilization", "mfu"),
)  # fmt: skip


def write(runs: Sequence[Facts], path: Path) -> None:
    """Write the page."""
    with atomic(path) as file:
        file.write(as_html(runs))


def as_html(runs: Sequence[Facts]) -> str:
    """The page."""
    parts = [
        STYLE,
        _now(runs),
        _losses(runs),
        _charts(runs),
        _time(runs),
        _timelines(runs),
        _processes(runs),
        _validation(runs),
    ]
    parts += [_samples(runs), _what_ran(runs)]
    return html.document(", ".join(run.name for run in runs), "".join(parts))


def _now(runs: Sequence[Facts]) -> str:
    rows = [
        (run.name, run.state.condition.value, f"{run.state.iteration} of {run.state.steps}", _last(run, "lm_loss"),
         _last(run, "validation_loss"), f"{run.goodput.ratio:.1%}", f"{run.tokens_per_second:,.0f}", run.state.words)
        for run in runs
    ]  # fmt: skip
    head = ("run", "state", "iteration", "loss", "validation", "goodput", "tokens/s, wall clock", "last word")
    return html.table(head, rows)


def _last(run: Facts, key: str) -> str:
    line = run.series(key)
    return f"{line[-1][1]:.4f}" if line else ""


def _losses(runs: Sequence[Facts]) -> str:
    curves, raw = {run.name: run.smoothed() for run in runs}, {run.name: run.series("lm_loss") for run in runs}
    dots = {_of(run, runs, "validation"): run.series("validation_loss") for run in runs}
    return _section("Loss, nats per token", svg.lines(curves, {k: v for k, v in dots.items() if v}, raw))


def _of(run: Facts, runs: Sequence[Facts], what: str) -> str:
    return f"{run.name}, {what}" if len(runs) > 1 else what


def _charts(runs: Sequence[Facts]) -> str:
    drawn = [
        f"<div><h3>{escape(title)}</h3>{chart}</div>"
        for title, key in CHARTS
        if (chart := svg.lines({run.name: run.series(key) for run in runs}))
    ]
    return f"<div class=charts>{''.join(drawn)}</div>"


def _time(runs: Sequence[Facts]) -> str:
    bars = "".join(
        f"<h3>{escape(run.name)}: {duration(run.goodput.wall)} since its first start</h3>"
        f"{svg.shares(run.goodput.seconds, PART_COLORS)}"
        for run in runs
    )
    names = [name for name in runs[0].goodput.seconds if any(run.goodput.seconds[name] >= 0.05 for run in runs)]
    rows = [(name, *(round(run.goodput.seconds[name], 1) for run in runs)) for name in names]
    return _section("Where the time went", bars + html.table(("seconds", *(run.name for run in runs)), rows))


def _timelines(runs: Sequence[Facts]) -> str:
    return _section("Starts, checkpoints and ends", "".join(map(_timeline, runs)))


def _timeline(run: Facts) -> str:
    if not run.attempts:
        return ""
    rows = [
        (f"start {i}", a.start["time"], a.last_time, ENDED.get(a.end["status"], "#b91c1c") if a.end else "#475569",
         [saved["time"] for saved in a.saved])
        for i, a in enumerate(run.attempts, 1)
    ]  # fmt: skip
    ends = (_moment(run.attempts[0].start["time"]), _moment(run.attempts[-1].last_time))
    told = [(i, *_told(a)) for i, a in enumerate(run.attempts, 1)]
    table = html.table(("start", "at", "on", "devices", "trained from", "up to", "checkpoints", "how it ended"), told)
    return f"<h3>{escape(run.name)}</h3>{svg.spans(rows, ends)}{table}{_spikes(run.attempts)}"


def _spikes(attempts: Sequence[Attempt]) -> str:
    rows = [
        (_moment(s["time"]), s["iteration"], f"{s['loss']:.4f}", f"{s['usual']:.4f}", s["action"],
         str(s.get("back_to", "")), f"{s['from']} to {s['to']}" if "from" in s else "")
        for a in attempts for s in a.spikes
    ]  # fmt: skip
    head = ("jump of the loss at", "iteration", "loss", "usual", "action", "went back to", "samples passed over")
    return html.table(head, rows) if rows else ""


def _told(a: Attempt) -> tuple[str, ...]:
    end = f"status {a.end['status']}: {a.end['why']}" if a.end else "no word"
    where = f"{a.start['host']}, process {a.start['pid']}"
    devices = f"{a.start.get('devices', '')} {a.start.get('device', '')}, {a.start.get('mesh', '')}"
    first = "" if a.first is None else str(a.first)
    return _moment(a.start["time"]), where, devices, first, str(a.iteration), str(len(a.saved)), end


PROCESSES = (
    ("rank", "rank"), ("host", "host"), ("step, ms", "step_ms"), ("waits for data, ms", "data_wait_ms"),
    ("a product, ms", "work_ms"), ("memory, GB", "memory_gb"), ("°C", "temperature_c"), ("W", "power_w"),
    ("memory errors", "memory_errors"),
)  # fmt: skip
SLOW_SHOWN = 20


def _processes(runs: Sequence[Facts]) -> str:
    """The last round of each run, the slowest process first, and what was said of slow ones."""
    parts = []
    for run in runs:
        if not run.ranks:
            continue
        last = sorted(run.ranks[-1]["ranks"], key=lambda row: -row["work_ms"])
        known = [(title, key) for title, key in PROCESSES if any(key in row for row in last)]
        rows = [[row.get(key, "") for _, key in known] for row in last]
        slow = [(each["iteration"], text) for each in run.ranks for text in each["slow"]][-SLOW_SHOWN:]
        told = html.table(("iteration", "slow or broken"), slow) if slow else ""
        title = f"<h3>{escape(run.name)}, iteration {run.ranks[-1]['iteration']}</h3>"
        parts.append(f"{title}{html.table([title for title, _ in known], rows)}{told}")
    return _section("Processes", "".join(parts))


def _validation(runs: Sequence[Facts]) -> str:
    sources = sorted({k for run in runs for row in run.rows for k in row if k.startswith("validation_loss/")})
    if not sources:
        return ""
    charts = [
        f"<div><h3>{escape(key.partition('/')[2])}</h3>{svg.lines({run.name: run.series(key) for run in runs})}</div>"
        for key in sources
    ]
    return _section("Validation of each source", f"<div class=charts>{''.join(charts)}</div>")


def _samples(runs: Sequence[Facts]) -> str:
    texts = [
        f"<h3>{escape(run.name)}, iteration {iteration}</h3><pre><b>{escape(prompt)}</b>{escape(text)}</pre>"
        for run in runs
        for iteration, prompt, text in run.samples
    ]
    return _section("What it writes", "".join(texts))


def _what_ran(runs: Sequence[Facts]) -> str:
    names = sorted({name for run in runs for name in run.changed})
    rows = [(name, *(_value(run, name) for run in runs)) for name in names]
    table = html.table(("flag", *(run.name for run in runs)), rows) if rows else ""
    versions = [(run.attempts[-1].start if run.attempts else {}) for run in runs]
    known = sorted({name for start in versions for name in start.get("versions", {})})
    told = [(name, *(start.get("versions", {}).get(name, "") for start in versions)) for name in known]
    told += [("command", *(str(start.get("command", "")) for start in versions))]
    kept = [("checkpoints", *(", ".join(map(str, run.checkpoints)) or "none" for run in runs))]
    head = ("", *(run.name for run in runs))
    return _section(
        "What ran", f"<h3>Flags that differ from the preset</h3>{table}<h3>Versions</h3>"
        f"{html.table(head, [*told, *kept])}",
    )  # fmt: skip


def _value(run: Facts, name: str) -> str:
    return str(run.changed[name][0]) if name in run.changed else ""


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
