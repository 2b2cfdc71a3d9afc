"""Commands of the project, each in a fork of one process that has imported torch: a start costs no import.

`outcomes` is for tests; the file itself is that process. Commands run as `python -m MODULE` or `python SCRIPT` do.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Outcome:
    returncode: int
    stdout: str
    stderr: str


def outcomes(commands: list[tuple[str, list[str]]]) -> list[Outcome]:
    """What becomes of every (folder to start in, [module or script.py, arguments ...])."""
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, input=json.dumps(commands), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]


def _child(folder: str, words: list[str]) -> int:
    os.chdir(folder)
    sys.argv = list(words)
    try:
        if words[0].endswith(".py"):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    from llama_fn.planner import page, search  # noqa: F401 (these take time to import)
    from llama_fn.run import loop  # noqa: F401

    for folder, words in json.load(sys.stdin):
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            if not (child := os.fork()):
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                status = _child(folder, words)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            print(json.dumps([status, out.read(), err.read()]), flush=True)


if __name__ == "__main__":
    main()
