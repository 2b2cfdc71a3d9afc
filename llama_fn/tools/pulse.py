"""How a run is, in one line, for cron; and an alert where somebody must look.

    python -m llama_fn.tools.pulse work/llama_65b --job=llama_65b --scheduler=slurm --log=main_log.txt
    7 * * * * cd /shared/llama_fn && .venv/bin/python -m llama_fn.tools.pulse work/llama_65b --mail=me@example.org

Tells a run that trains, prepares or waits for its devices from one that stands still, gets worse, failed, or is gone.
The work folder says so, and the scheduler where one is named. --mail, --webhook and --command are told of every alert,
again after --quiet_hours, and of a recovery.

Exit status 0: running, preparing, scheduled or finished. 11: running but not progressing. 12: failed. 13: diverging.
14: not running or scheduled. 15: scheduled but not running for too long. 2: wrong input, or a scheduler that does not
answer.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.operations import alerts, pulse
from llama_fn.operations.schedulers import SCHEDULERS
from llama_fn.operations.state import Limits
from llama_fn.tools import command

FLAGS = flags.FLAGS


def check(argv: list[str]) -> int:
    """Say it, write it, tell it; the status."""
    if len(argv) != 2:
        raise UserError("name one work folder")
    workdir = Path(os.path.expanduser(argv[1]))
    name = FLAGS.job or workdir.resolve().name
    limits = Limits(FLAGS.stuck, FLAGS.prepare_minutes * 60, FLAGS.worse)
    url = alerts.checked(FLAGS.webhook) if FLAGS.webhook else ""
    found = pulse.take(workdir, name, FLAGS.scheduler, limits, FLAGS.wait_hours * 3600)
    line = found.line()
    print(line, flush=True)
    if FLAGS.log:
        with open(os.path.expanduser(FLAGS.log), "a", encoding="utf-8") as log:
            log.write(line + "\n")
    tellers = _tellers(name, line, found.status, url)
    quiet = alerts.Quiet(_memory(workdir), FLAGS.quiet_hours * 3600)
    if tellers and quiet.due(found.status):
        wrong = alerts.tell(tellers)
        for sentence in wrong:
            print(f"error: the alert was not told: {sentence}", file=sys.stderr)
        if len(wrong) < len(tellers):
            quiet.told(found.status)
    return found.status


def _tellers(name: str, line: str, status: int, url: str) -> dict[str, Callable[[], None]]:
    calls: dict[str, Callable[[], None]] = {}
    subject = f"{name}: {'ALERT' if status else 'well again'}"
    if FLAGS.mail:
        sender = FLAGS.mail_from or f"{getpass.getuser()}@{socket.getfqdn()}"
        mail = alerts.Mail(FLAGS.mail_server, sender, tuple(FLAGS.mail))
        calls["--mail"] = lambda: mail.send(subject, line)
    if url:
        calls["--webhook"] = lambda: alerts.post(url, FLAGS.webhook_shape, line)
    if FLAGS.command:
        calls["--command"] = lambda: alerts.run(FLAGS.command, line)
    return calls


def _memory(workdir: Path) -> Path:
    """Where it is kept what was told: in the home of whoever is told, as a work folder may be another's, or gone."""
    if FLAGS.state:
        return Path(os.path.expanduser(FLAGS.state))
    base = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    return base / "llama_fn" / f"pulse{str(workdir.resolve()).replace('/', '_')}.json"


def main(argv: list[str]) -> None:
    """The command."""
    sys.exit(command.status_of(lambda: check(argv)))


if __name__ == "__main__":
    flags.DEFINE_string("job", "", "name of the job; empty: that of the work folder")
    flags.DEFINE_enum(
        "scheduler", "process", [*SCHEDULERS, "process"], "who knows the job; process: the work folder alone"
    )
    flags.DEFINE_float(
        "stuck", 10.0, "not progressing: so many times the usual time without a record, a minute at least", 1
    )
    flags.DEFINE_float("prepare_minutes", 60.0, "not progressing: so long without a first step", 0)
    flags.DEFINE_float("worse", 1.0, "diverging: the mean of 20 losses is so many nats above the best of them", 0)
    flags.DEFINE_float("wait_hours", 72.0, "scheduled for longer is an alert", 0)
    flags.DEFINE_string("log", "", "file to which the line is added, such as main_log.txt")
    flags.DEFINE_list("mail", [], "addresses to write to")
    flags.DEFINE_string("mail_server", "localhost", "HOST or HOST:PORT that takes mail")
    flags.DEFINE_string("mail_from", "", "sender; empty: this user on this machine")
    flags.DEFINE_string("webhook", "", "http address of a chat to post to")
    flags.DEFINE_enum("webhook_shape", "slack", [*alerts.BODIES], "whose form the post has")
    flags.DEFINE_string("command", "", "command that gets the line as its last argument; no shell")
    flags.DEFINE_float("quiet_hours", 6.0, "the same alert is told again after this", 0)
    flags.DEFINE_string("state", "", "file that remembers what was told; empty: below ~/.local/state/llama_fn")
    app.run(main, flags_parser=command.parse)
