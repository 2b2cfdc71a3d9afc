"""Start a run on one machine, on several, in a SLURM job or on Kubernetes; --dry_run says what that would run.

    python -m llama_fn.tools.launch --on=slurm --flagfile=configs/llama_65b_32npu.flags --run.workdir=/a/b --dry_run
    python -m llama_fn.tools.launch --on=nodes --node_rank=1 --first_host=n1 --flagfile=... --run.workdir=/shared/run

Takes train.py's flags and hands them on. Before anything starts it checks them, and that whole machines have the mesh's
devices. What starts a run again after a crash, and what a cluster must have, is in docs/operations.md.

Exit status: that of what it starts; 0 for --dry_run; 2 for wrong input.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

from absl import app, flags

from llama_fn import config_checks
from llama_fn.errors import UserError
from llama_fn.operations import launching
from llama_fn.operations.launching import Job, Launch
from llama_fn.planner import config_stages
from llama_fn.tools import command, config_flags

FLAGS = flags.FLAGS
OWN = ("on", "devices", "node_rank", "first_host", "name", "image")  # that have a value


def launch(argv: list[str]) -> int:
    """Start what the flags say, or say it."""
    job = _job(argv)
    made = launching.WAYS[FLAGS.on](job)
    if FLAGS.dry_run:
        return command.shown(_told(job, made))
    if made.given and launching.PLACEHOLDER in made.given:
        raise UserError(f"--image is needed: {launching.PLACEHOLDER}... of the manifest is no image of yours")
    if made.everywhere and (FLAGS.node_rank is None or not FLAGS.first_host):
        raise UserError(f"--on=nodes needs --node_rank, 0 to {job.machines - 1}, and --first_host, on each machine")
    if shutil.which(made.words[0]) is None:
        raise UserError(f"{made.words[0]} is no program on this machine; --dry_run says what would run")
    return subprocess.run(made.words, cwd=launching.ROOT, input=made.given or None, text=True).returncode


def _job(argv: list[str]) -> Job:
    """UserError for what train.py would not take, and for a mesh that is not that of the machines."""
    flagfile, more = _handed_on(argv[1:])
    if not flagfile:
        raise UserError("give --flagfile, the run's flags, such as configs/llama_65b_32npu.flags")
    cfg = config_checks.resolved(config_flags.build_config())
    mesh = config_stages.mesh(cfg)
    config_stages.rules(cfg, mesh)
    machines, rest = divmod(mesh.size, FLAGS.devices)
    if rest:
        raise UserError(
            f"--mesh.axes={mesh} has {mesh.size} devices, no multiple of --devices={FLAGS.devices}, those of a machine"
        )
    rank = "NODE_RANK" if FLAGS.node_rank is None else str(FLAGS.node_rank)
    name = FLAGS.name or os.path.basename(os.path.normpath(cfg.run.workdir)) or "llama_fn"
    host, workdir = FLAGS.first_host or "FIRST_HOST", cfg.run.workdir
    return Job(name, flagfile, workdir, machines, FLAGS.devices, more, rank, host, FLAGS.image)


def _handed_on(words: list[str]) -> tuple[str, list[str]]:
    """The first flagfile, and train.py's further flags as they were typed, the work folder aside."""
    flagfile, kept, given = "", [], iter(words)
    for word in given:
        name, equals, value = word.removeprefix("--").removeprefix("-").partition("=")
        if name.removeprefix("no") == "dry_run":
            continue
        if name not in (*OWN, "flagfile", "run.workdir"):
            kept.append(word)
            continue
        value = value if equals else next(given, "")
        if name == "flagfile" and flagfile:
            kept.append(f"--flagfile={value}")
        elif name == "flagfile":
            flagfile = value
    return flagfile, kept


def _told(job: Job, made: Launch) -> str:
    count = job.machines * job.devices
    where = f"on every machine, NODE_RANK 0 to {job.machines - 1}" if made.everywhere else "here"
    what = f"{job.name}: {count} processes, {job.devices} on each of {job.machines} machine{'s' * (job.machines > 1)}"
    parts = [what, f"{where}:\n  {made.shown}"]
    if made.starts:
        parts.append(f"which makes every machine run:\n  {made.starts}")
    if made.given:
        parts.append(f"with this manifest:\n{made.given.rstrip()}")
    scripts = [word for word in shlex.split(made.shown) if word.endswith((".sh", ".sbatch"))]
    missing = [word for word in (*scripts, job.flagfile) if not (launching.ROOT / word).exists()]
    parts += [f"not there: {word}" for word in missing]
    return "\n".join(parts)


def main(argv: list[str]) -> None:
    """The command: exit status 2 for wrong input."""
    sys.exit(command.status_of(lambda: launch(sys.argv)))


if __name__ == "__main__":
    config_flags.define_flags()
    flags.DEFINE_enum("on", "one", list(launching.WAYS), "what starts the processes")
    flags.DEFINE_integer("devices", 8, "devices of a machine, with a process for each", 1)
    flags.DEFINE_integer("node_rank", None, "--on=nodes: which machine this is, from 0", 0)
    flags.DEFINE_string("first_host", "", "--on=nodes: the machine of node_rank 0")
    flags.DEFINE_string("name", "", "of the job; empty: that of the work folder")
    flags.DEFINE_string("image", "", "--on=pytorchjob or volcano: the container's image")
    flags.DEFINE_bool("dry_run", False, "say what would run, and start nothing")
    app.run(main, flags_parser=config_flags.parse)
