"""Is this machine ready to train on its Ascend NPUs, and how far are the predictions?

    python -m llama_fn.tools.check_npu
    python -m llama_fn.tools.check_npu --graphs=DIR
    torchrun --nproc_per_node=8 -m llama_fn.tools.check_npu --graphs=DIR --axes=data:2,model:4

The first says what is there and what is missing, then compares two compiled steps on the NPU with the same steps run op
by op on the CPU. With --graphs it writes, for steps of growing size, the GE graph as text and as a model file (.air),
and the `atc` commands that compile these without a device (atc.sh). Where there is an NPU it runs the steps, compares
the small ones with the CPU, times compilation, steps, products and copies, and writes all of it beside what was
predicted into DIR/report.json, which `plan --calibration=DIR/report.json` reads. Under torchrun it times collectives
along each of --axes into the same report instead.

Exit status 0 where all that was compared agrees, 1 where it does not or something is missing, 2 for wrong input.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from llama_fn.errors import UserError
from llama_fn.files import atomic
from llama_fn.tools import command

FLAGS = flags.FLAGS
TOLERANCE = 1e-3  # relative, float32 on both sides; the NPU may round products through hf32


def check() -> int:
    """Print what this machine has and lacks, do what the flags ask for; the exit status."""
    from llama_fn.ascend import requirements

    needed = list(requirements.on_this_machine())
    print(requirements.as_text(needed))
    missing = {r.what for r in needed if not r.there}
    if not FLAGS.graphs:
        return 1 if missing else _climb(["tiny"], None, True)
    if missing & {"torch_npu", "CANN"}:
        print("  no graphs without torch_npu and CANN's libraries, which make them")
        return 1
    if not FLAGS.axes:
        return _climb(FLAGS.ladder, Path(FLAGS.graphs), not missing)
    if missing:
        return 1
    return _time_axes(Path(FLAGS.graphs))


def _climb(names: list[str], folder: Path | None, on_device: bool) -> int:
    """The steps of the ladder; their graphs and the report in `folder`, if there is one."""
    from llama_fn.ascend import device
    from llama_fn.tools import npu_ladder

    hardware, about = device.described(on_device)
    rows: list[dict[str, Any]] = []
    commands: list[str] = []
    for rung in npu_ladder.rungs(names):
        row: dict[str, Any] = {"name": rung.name, "predicted": npu_ladder.predicted(rung, hardware), "measured": None}
        below = folder / rung.name if folder else None
        compiled = npu_ladder.converted(rung, below)
        if on_device:
            row["measured"] = npu_ladder.measured(rung, compiled, "npu")
        rows.append(row)
        commands += [npu_ladder.atc(below)] if below else []
        print(npu_ladder.as_line(row), flush=True)
    if folder:
        measured = npu_ladder.rates("npu") if on_device else {}
        _write_report(folder, {"hardware": hardware.name, **about, **measured, "graphs": rows})
        with atomic(folder / "atc.sh") as f:
            f.write("\n".join(["set -ex", *(f"time {each}" for each in commands)]) + "\n")
        print(f"  atc.sh beside it compiles the graphs without a device: {folder / 'atc.sh'}")
    far = [row["name"] for row in rows if row["measured"] and (row["measured"]["apart"] or 0.0) > TOLERANCE]
    if far:
        print(f"  further than {TOLERANCE} from the CPU: {', '.join(far)}")
    return 0 if on_device and not far else 1


def _time_axes(folder: Path) -> int:
    """Collectives along each of --axes, into the report, by all processes."""
    from llama_fn.ascend import device
    from llama_fn.distributed import bandwidth, start
    from sharding import Mesh

    try:
        mesh = Mesh.parse(FLAGS.axes)
    except ValueError as error:
        raise UserError(f"--axes: {error}") from None
    hardware, about = device.described(True)
    processes = start(mesh, "npu", 600)
    if processes is None:
        raise UserError(f"--axes={FLAGS.axes} takes {mesh.size} processes: start this with torchrun")
    rows = bandwidth.by_axis(processes, "npu", hardware.per_machine)
    if processes.chief:
        for row in rows:
            print(f"  {row['axis']}: {row['devices']} devices, {row['bytes_per_s'] / 1e9:.1f} GB/s sent by each")
        _write_report(folder, {"hardware": hardware.name, **about, "axes": rows})
    processes.close()
    return 0


def _write_report(folder: Path, found: dict[str, Any]) -> None:
    """Add what was found to the report, which a command with other flags may have begun on the same hardware."""
    from llama_fn.planner.calibration import FORMAT, REPORT, read_report

    path = folder / REPORT
    before = read_report(path, "--graphs") if path.exists() else found
    if before["hardware"] != found["hardware"]:
        raise UserError(f"{path} is of {before['hardware']}, not {found['hardware']}: name another --graphs")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with atomic(path) as f:
        json.dump({**before, **found, "format": FORMAT, "date": date}, f, indent=1)
    print(f"  report: {path}; `python -m llama_fn.tools.plan --calibration={path}` reads it")


def main(argv: list[str]) -> None:
    """The command: exit status 0, 1 or 2."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    sys.exit(command.status_of(check))


if __name__ == "__main__":
    flags.DEFINE_string("graphs", "", "folder for graphs and report.json; empty: two steps of llama_tiny are compared")
    flags.DEFINE_list("ladder", "tiny,60m,1b,7b_8layers,65b_2layers", "with --graphs: which steps")
    flags.DEFINE_string("axes", "", "with --graphs, under torchrun: mesh whose axes are timed, such as data:2,model:4")
    app.run(main, flags_parser=command.parse)
