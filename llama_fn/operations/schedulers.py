"""What a scheduler says of a job: running, waiting, or not known. Asked with its own programs, without a shell."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from llama_fn.errors import UserError

ASK_S = 60
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")


@dataclass(frozen=True)
class Job:
    """`running`, else it waits; `since`: when it began, or was handed in, seconds since 1970, 0 where that is not told;
    `starts`: when it is expected to begin, likewise; `where`: partition or namespace; `notes`: nodes, or why it waits.
    """

    id: str
    running: bool
    since: float
    where: str
    notes: str
    starts: float = 0.0


def slurm(name: str) -> list[Job]:
    """The jobs of that name of this user, as squeue knows them."""
    form = "%i|%T|%P|%N|%S|%V|%r"  # id, state, partition, nodes, start, handed in, reason
    text = _ask(["squeue", "--me", "--noheader", f"--name={name}", f"--format={form}"])
    jobs = []
    for line in filter(str.strip, text.splitlines()):
        words = line.strip().split("|")
        if len(words) != 7:
            raise UserError(f"squeue answered {line.strip()[:200]!r}, and seven fields separated by | were asked for")
        number, state, partition, nodes, start, handed_in, reason = words
        running = state in RUNNING
        since, starts = (_moment(start), 0.0) if running else (_moment(handed_in), _moment(start))
        jobs.append(Job(number, running, since, partition, nodes if running else reason, starts))
    return jobs


def kubernetes(name: str) -> list[Job]:
    """The pods whose label job-name, or training.kubeflow.org/job-name, is that name; in the namespace of kubectl's
    context."""
    found = []
    for label in ("training.kubeflow.org/job-name", "job-name", "volcano.sh/job-name"):
        text = _ask(["kubectl", "get", "pods", f"--selector={label}={name}", "--output=json"])
        try:
            found = [_pod(item) for item in json.loads(text)["items"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"kubectl answered what is no list of pods ({error!r})") from None
        if found:
            break
    return [job for job in found if job is not None]


def _pod(item: dict[str, Any]) -> Job | None:
    """None for one that has ended."""
    meta, status = item["metadata"], item["status"]
    if status["phase"] not in ("Running", "Pending"):
        return None
    running = status["phase"] == "Running"
    since = _moment(status.get("startTime") if running else meta.get("creationTimestamp"))
    waits = [c.get("reason", "") for c in status.get("conditions", ()) if c.get("status") == "False"]
    notes = item["spec"].get("nodeName", "") if running else ", ".join(filter(None, waits))
    return Job(meta["name"], running, since, meta.get("namespace", "default"), notes)


def _moment(text: str | None) -> float:
    """Seconds since 1970; 0 for N/A and the like. Without a zone it is this machine's."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def _ask(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASK_S)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not on this machine: run pulse where it is, or name another --scheduler"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} did not answer within {ASK_S} s") from None
    if done.returncode:
        raise UserError(f"{words[0]} failed with status {done.returncode}: {done.stderr.strip()[:300]}")
    return done.stdout


SCHEDULERS: dict[str, Callable[[str], list[Job]]] = {"slurm": slurm, "kubernetes": kubernetes}


def until(moment: float) -> float:
    """Seconds from now."""
    return max(0.0, moment - time.time())
