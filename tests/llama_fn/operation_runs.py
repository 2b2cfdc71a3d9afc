"""Work folders as runs leave them, staged."""

from __future__ import annotations

import json
import os
import time

from llama_fn.run import metrics
from llama_fn.run.events import FILE, PARTS
from llama_fn.run.workdir_lock import FILE as LOCK
from llama_fn.run.workdir_lock import _me


def start(ago=3600.0, **more):
    return {"time": time.time() - ago, "event": "start", "pid": os.getpid(), "host": "here", "steps": 1000, **more}


def training(ago=3500.0, iteration=0):
    return {"time": time.time() - ago, "event": "training", "iteration": iteration, "steps": 1000, "restored": False}


def spent(ago, iteration, **parts):
    return {"time": time.time() - ago, "event": "spent", "iteration": iteration, **dict.fromkeys(PARTS, 0.0), **parts}


def end(status, why="", ago=10.0, iteration=100):
    return {"time": time.time() - ago, "event": "end", "status": status, "iteration": iteration, "why": why}


def rows(losses, step_s=3.0):
    return [{"iteration": i + 1, "lm_loss": loss, "step_time_ms": step_s * 1e3} for i, loss in enumerate(losses)]


def staged(folder, events, losses=(), quiet_s=1.0, lock="alive", step_s=3.0):
    """`quiet_s`: how long ago the last record came; `lock`: whose process lives, is dead, or is on another machine."""
    folder.mkdir(parents=True)
    (folder / FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    if losses:
        path = folder / "metrics.jsonl"
        path.write_text("".join(metrics.as_json(row) + "\n" for row in rows(losses, step_s)))
        os.utime(path, (time.time() - quiet_s,) * 2)
    if lock:
        me = _me()
        owner = {"alive": me, "dead": {**me, "started": "1"}, "elsewhere": {**me, "boot": "other"}}[lock.split()[0]]
        (folder / LOCK).write_text(json.dumps(owner))
        if lock.endswith("long ago"):
            os.utime(folder / LOCK, (time.time() - 600,) * 2)
    return folder
