"""A page about one run, or about several side by side, that needs no network.

    python -m llama_fn.tools.report work/llama_65b
    python -m llama_fn.tools.report work/a work/b --out=both.html

State, losses, speed, where the time went, every start with its end, validation, samples, flags and versions. A run
writes its own at its end.

Exit status 0, or 2 for wrong input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.operations import facts, report
from llama_fn.tools import command

FLAGS = flags.FLAGS


def make(argv: list[str]) -> int:
    """Write it."""
    if len(argv) < 2:
        raise UserError("name one or more work folders")
    folders = [Path(os.path.expanduser(word)) for word in argv[1:]]
    out = Path(os.path.expanduser(FLAGS.out)) if FLAGS.out else folders[0] / report.FILE
    report.write([facts.gather(folder) for folder in folders], out)
    print(out)
    return 0


def main(argv: list[str]) -> None:
    """The command: exit status 0 or 2."""
    sys.exit(command.status_of(lambda: make(argv)))


if __name__ == "__main__":
    flags.DEFINE_string("out", "", f"file to write; empty: {report.FILE} in the first work folder")
    app.run(main, flags_parser=command.parse)
