"""Starts train.py once for every case on standard input, in a fork of a process that has imported it.

A case is [folder, flags]; the answer, a line of JSON, is [exit status, what was written to standard error].
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from llama_fn.run import loop  # noqa: F401 (what takes time to import)

train.define_flags()
for _, arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as said:
        if not (child := os.fork()):
            os.dup2(said.fileno(), 2)
            sys.argv = ["train.py", *arguments]
            train.main(train.parse(sys.argv))  # which ends the process, as a wrong flag does in parse
        _, status = os.waitpid(child, 0)
        said.seek(0)
        print(json.dumps([os.waitstatus_to_exitcode(status), said.read()]), flush=True)
