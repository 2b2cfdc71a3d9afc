"""Will it fit, how fast can it be, and what goes over the wire? Answers from the step's graph, on any laptop.

    python -m llama_fn.tools.plan --flagfile=configs/llama_65b_96npu.flags
    python -m llama_fn.tools.plan --model.preset=llama_7b --mesh.axes=data:8 --hardware=h100 --json=plan.json

    python -m llama_fn.tools.plan --flagfile=configs/llama_7b_8npu.flags --search=8

Takes train.py's flags. Nothing is allocated and no process group is made. Exit status 0 where the predicted peak fits
the device's memory, or where the search finds something that does, 1 where not, 2 for wrong input. How the numbers are
made: llama_fn/planner/plan.py.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_fn import config, config_checks
from llama_fn.errors import UserError
from llama_fn.files import atomic, check_writable
from llama_fn.tools import command, config_flags

FLAGS = flags.FLAGS


def _start_imports() -> None:
    """Begin what the search's processes take seconds for, once for all of them and while this one does the same."""
    multiprocessing.set_forkserver_preload(["llama_fn.planner.search"])
    forkserver.ensure_running()


def _search(cfg: config.Config, devices: int, device: Any) -> int:
    """Print what fits and what does not; status 0 if anything fits, else 1."""
    from rich.console import Console

    from llama_fn import compat
    from llama_fn.planner import search

    with Console(stderr=True).status("") as status:
        tried = search.search(cfg, devices, device, status.update, compat.physical_cores())
    print(search.as_text(tried))
    return 0 if any(each.plan for each in tried) else 1


def make_plan(argv: list[str]) -> int:
    """Print and write what was asked for; exit status 0 where the run fits, else 1."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --section.name=value")
    cfg = config_checks.resolved(config_flags.build_config())
    for path in filter(None, (FLAGS.json, FLAGS.page, FLAGS.trace)):  # before seconds of work
        check_writable(Path(path))
    if FLAGS.search:
        _start_imports()
    from llama_fn import hardware
    from llama_fn.planner import calibration, config_stages, ge_budget, page, plan, report, trace

    device = hardware.named(FLAGS.hardware, cfg.model.compute_dtype)
    if FLAGS.calibration:
        device = calibration.calibrated(device, Path(FLAGS.calibration))
    if FLAGS.search:
        return _search(cfg, FLAGS.search, device)
    mesh = config_stages.mesh(cfg)
    planned, ge = plan.make(cfg, mesh, device), ge_budget.make(cfg, mesh, device)
    print(report.as_text(planned, ge))
    if FLAGS.json:
        with atomic(Path(FLAGS.json)) as f:
            json.dump(report.as_json(planned, ge), f, indent=1, allow_nan=False)
    if FLAGS.page:
        with atomic(Path(FLAGS.page)) as f:
            f.write(page.page(planned, ge))
    if FLAGS.trace:
        if planned.pipeline is None:
            raise UserError(f"--trace={FLAGS.trace}: only the step of a pipeline is simulated; add pipe to --mesh.axes")
        with atomic(Path(FLAGS.trace)) as f:
            json.dump(trace.trace(planned.pipeline), f)
    return 0 if planned.fits else 1


def main(argv: list[str]) -> None:
    """The command: exit status 0, 1 or 2."""
    sys.exit(command.status_of(lambda: make_plan(argv)))


if __name__ == "__main__":
    config_flags.define_flags()
    flags.adopt_module_key_flags(config_flags)
    flags.DEFINE_string("hardware", "ascend_910b1", "device of llama_fn/hardware.py to plan for")
    flags.DEFINE_string(
        "calibration", "", "report of check_npu --graphs, whose rates stand for those of the data sheet"
    )
    flags.DEFINE_string("json", "", "file that gets everything as JSON as well")
    flags.DEFINE_integer("search", 0, "number of devices: list the meshes, rules, microbatches and remat that fit", 0)
    flags.DEFINE_string("page", "", "HTML file that gets everything with plots as well; needs matplotlib")
    flags.DEFINE_string("trace", "", "file that gets the simulated step of a pipeline, for https://ui.perfetto.dev")
    app.run(main, flags_parser=config_flags.parse)
