"""Compiles one step into the cache, for another process that compiles another one meanwhile (ahead.py).

python -m llama_fn.run.compile_one evaluate < FLAGS_AS_JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from llama_fn.config import Config
from llama_fn.config_fields import with_values
from llama_fn.planner import config_stages
from llama_fn.run import compiling, runtime


def main() -> None:
    """Flags come as a line of JSON. Once standard input ends, nobody waits for this any more."""
    cfg = with_values(Config(), json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_input, daemon=True).start()
    runtime.log_to_terminal(None)  # what is said of a step is kept with it
    runtime.setup(cfg.run)
    compiling.compile_one(sys.argv[1], cfg, config_stages.mesh(cfg))


def _end_with_input() -> None:
    sys.stdin.read()
    os.killpg(os.getpgrp(), signal.SIGKILL)  # compilers too


if __name__ == "__main__":
    main()
