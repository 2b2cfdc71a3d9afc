"""Train an iteration of a run again, from the checkpoint before it, and compare with what the run logged.

    python -m llama_fn.tools.replay work/llama_60m --step=1234
    python -m llama_fn.tools.replay work/llama_60m --step=1234 --check_finite
    torchrun --nproc_per_node=8 -m llama_fn.tools.replay work/llama_65b --step=1234 --mesh=data:8

On the same mesh, device and backend every number comes again bit for bit; on others the differences are round-off, and
the table shows how large. --check_finite names the first op that gives a number which is not finite, with its scope and
line, on any mesh that --backend=interpret simulates. The run itself may go on: nothing of it is changed, and what is
written lies in WORKDIR/replay_STEP, or --out.

Exit status 0: each number is the one that was logged. 1: some differ, or an op gave what is not finite. 2: wrong input.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_fn.config import Config
from llama_fn.config_checks import resolved
from llama_fn.config_fields import flat, with_values
from llama_fn.data import skips
from llama_fn.errors import UserError
from llama_fn.launch import launched
from llama_fn.run import health, records
from llama_fn.tools import command

FLAGS = flags.FLAGS
NEVER = 2**31 - 1
COMPARED = ("lm_loss", "grad_norm")


def replay(argv: list[str]) -> int:
    """Train it again; the status."""
    if len(argv) != 2 or FLAGS.step is None:
        raise UserError("name one work folder, and --step, an iteration")
    workdir = Path(os.path.expanduser(argv[1])).absolute()
    out = Path(os.path.expanduser(FLAGS.out)).absolute() if FLAGS.out else workdir / f"replay_{FLAGS.step}"
    logged = {row["iteration"]: row for row in records.read(workdir)}
    cfg = _config(workdir, out)
    from llama_fn.run import loop

    if launched().rank == 0:
        _prepare(workdir, out)
    status = loop.run(cfg)
    if launched().rank != 0:
        return 0
    if status == health.STATUS:
        return 1
    again = {row["iteration"]: row for row in records.read(out)}
    return 0 if _compared(logged, again) else 1


def _config(workdir: Path, out: Path) -> Config:
    """The run's own, but for where it is written, what looks at it, and what the flags here say."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: {workdir} is no work folder of a run")
    saved = json.loads(path.read_bytes())
    known = flat(Config())
    cfg = with_values(Config(), {name: value for name, value in saved.items() if name in known})
    if not 1 <= FLAGS.step <= cfg.run.steps:
        raise UserError(f"--step={FLAGS.step} is none of the run's iterations, 1 to {cfg.run.steps}")
    backend = FLAGS.backend or ("interpret" if FLAGS.check_finite else cfg.run.backend)
    run = replace(
        cfg.run, workdir=str(out), stop_at=FLAGS.step, backend=backend, check_finite=FLAGS.check_finite,
        device=FLAGS.device or ("cpu" if FLAGS.check_finite else cfg.run.device), accept_changes=True, log_every=1,
        eval_every=0, sample_every=0, local_every=0, local_dir="", checkpoint_every=NEVER, keep_every=0,
        wandb="", mlflow="", prometheus="", norms_every=0, tensorboard=False, dump_dir="", profile_steps="",
        stop_after_skipped=0,
    )  # fmt: skip
    axes = cfg.mesh.axes if FLAGS.mesh is None else FLAGS.mesh
    return resolved(replace(cfg, run=run, mesh=replace(cfg.mesh, axes=axes)))


def _prepare(workdir: Path, out: Path) -> None:
    """A work folder that begins with the newest checkpoint before the iteration, without a second copy of it."""
    if out.exists():
        shutil.rmtree(out)
    folder = workdir / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    before = max((step for step in steps if step < FLAGS.step), default=0)
    (out / "checkpoints").mkdir(parents=True)
    if before:
        shutil.copytree(folder / str(before), out / "checkpoints" / str(before), copy_function=os.link)
    if (workdir / skips.FILE).exists():
        shutil.copy(workdir / skips.FILE, out)
    if (workdir / "data").is_dir():
        (out / "data").symlink_to(workdir / "data")
    print(f"from iteration {before} to {FLAGS.step}", flush=True)


def _compared(logged: dict[int, Any], again: dict[int, Any]) -> bool:
    """Whether all that both have is the same to the bit; a line for each iteration."""
    same = True
    both = sorted(set(logged) & set(again))
    if not both:
        print(f"the run logged none of the iterations up to {FLAGS.step}: nothing to compare with")
    for iteration in both:
        words = []
        for name in COMPARED:
            was, now = logged[iteration][name], again[iteration][name]
            equal = was == now or (was != was and now != now)
            same &= equal
            words.append(f"{name} {was!r}" + (" again" if equal else f", now {now!r} ({_apart(was, now)})"))
        print(f"iteration {iteration}: {'; '.join(words)}")
    return same


def _apart(was: float, now: float) -> str:
    return f"{abs(now - was) / abs(was):.2e} of it" if was and was == was else f"{now - was:.2e} apart"


def main(argv: list[str]) -> None:
    """The command: exit status 0, 1 or 2."""
    command.leave(command.status_of(lambda: replay(argv)))


if __name__ == "__main__":
    flags.DEFINE_integer("step", None, "the iteration to train again, from 1", 1)
    flags.DEFINE_enum("backend", None, ["inductor", "interpret", "eager", "npu"], "another than the run's")
    flags.DEFINE_string("device", None, "another than the run's")
    flags.DEFINE_string("mesh", None, "another than the run's, such as data:2; empty is one device")
    flags.DEFINE_bool("check_finite", False, "look at every op's result, and name the first that is not finite")
    flags.DEFINE_string("out", "", "folder for what is written; empty: replay_STEP in the work folder. It is emptied")
    app.run(main, flags_parser=command.parse)
