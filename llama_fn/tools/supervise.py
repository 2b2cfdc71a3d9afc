"""Run a command, and start it again after a crash or a hang, from the last good checkpoint.

    python -m llama_fn.tools.supervise --workdir=work/llama_65b -- bash configs/torchrun_one_node.sh 8 FLAGFILE
    python -m llama_fn.tools.supervise --workdir=work/llama_65b -- srun --exclude={exclude} ... train.py ...

A command that is done (status 0), has wrong input (2) or ruined numbers (4) is left alone; any other end starts it
again, sooner where it got further. Signals are passed on, and end the supervising too. The output of each start is in
WORKDIR/supervise. {exclude} in a word becomes the hosts that others named as standing still.

Exit status: the command's last one; 7 after --most starts in a row that got no further; 2 for wrong input.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.operations.state import Limits
from llama_fn.operations.supervisor import Supervisor
from llama_fn.tools import command

FLAGS = flags.FLAGS


def supervise(argv: list[str]) -> int:
    """Until it is done."""
    words = argv[1:]
    if not FLAGS.workdir or not words:
        raise UserError("give --workdir, the run's work folder, and behind -- the command that trains in it")
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]} is no program on this machine")
    logging.basicConfig(format="supervise: %(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    limits = Limits(FLAGS.stuck, FLAGS.prepare_minutes * 60)
    workdir = Path(os.path.expanduser(FLAGS.workdir))
    waits = (FLAGS.wait_s, FLAGS.longest_s, FLAGS.grace_s, FLAGS.look_s)
    return Supervisor(words, workdir, limits, FLAGS.most, *waits).run()


def main(argv: list[str]) -> None:
    """The command."""
    sys.exit(command.status_of(lambda: supervise(argv)))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "work folder of the run, whose events.jsonl says how it is")
    flags.DEFINE_integer("most", 10, "give up after so many starts again in a row that got no further", 0)
    flags.DEFINE_float("wait_s", 10.0, "seconds before the first start again; doubled each time", 0)
    flags.DEFINE_float("longest_s", 600.0, "the most that is waited", 0)
    flags.DEFINE_float("grace_s", 600.0, "from the signal to a run that stands still until it is killed", 0)
    flags.DEFINE_float("look_s", 10.0, "between two looks", 0.05)
    flags.DEFINE_float("stuck", 10.0, "standing still: no record for so many times the usual time, and a minute", 1)
    flags.DEFINE_float("prepare_minutes", 60.0, "standing still: so long without a first step", 0)
    app.run(main, flags_parser=command.parse)
