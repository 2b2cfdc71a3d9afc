"""Starts one run again and again, each time in a fork that is killed after a while, and lets it finish then.

    python tests/multirank/worker_kills.py KILLS SEED WORKDIR train.py flag ...

Imports are done once, before the forks: nothing is on disk yet while they go on, so a kill there shows nothing.
"""

import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def started(words: list[str], log: Path) -> int:
    if child := os.fork():
        return child
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = words
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    os._exit(0)


def iteration(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return max((json.loads(line)["iteration"] for line in lines[-2:] if line.endswith(b"}")), default=0)


def main() -> None:
    kills, seed, workdir, words = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    from llama_fn.run import loop  # noqa: F401
    from llama_fn.signals import UNSAVED

    chance, log = random.Random(seed), workdir.with_suffix(".log")
    begun, child = time.monotonic(), started([*words, "--run.stop_at=3"], log)
    os.waitpid(child, 0)
    whole = time.monotonic() - begun  # a start and some steps
    for _ in range(kills):
        child = started(words, log)
        time.sleep(chance.uniform(0, 2 * whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    last = iteration(workdir) + 5
    for folder, more in ((workdir, []), (workdir.with_name("alone"), ["--run.checkpoint_every=1000000"])):
        child = started([*words, f"--run.stop_at={last}", *more, f"--run.workdir={folder}"], log)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == UNSAVED, (folder, status)  # as --run.stop_at leaves it
    print(last)


if __name__ == "__main__":
    main()
