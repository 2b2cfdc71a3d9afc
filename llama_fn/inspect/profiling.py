"""A trace of chosen iterations for Perfetto (ui.perfetto.dev): torch.profiler on CPU and CUDA, torch_npu's on an NPU.

Written as workdir/profile/rank_R_steps_A_B.json, whose ranges carry our scopes (compiler/ranges.py); on an NPU as the
folder that torch_npu.profiler and MindStudio read, the ranges in its scopes.json. With it goes rank_R_steps_A_B.txt,
which compares every scope with what the planner predicts (llama_fn/inspect/profile_table.py).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from llama_fn.compiler import stages
from llama_fn.compiler.ranges import RANGES, Timeline
from llama_fn.config import Config
from llama_fn.config_checks import dumps, profiled
from llama_fn.files import atomic
from llama_fn.hardware import Hardware, named
from llama_fn.inspect import dump, profile_table

log = logging.getLogger("llama_fn.profiling")


class Profiler:
    """Starts before the first and stops after the last iteration that --run.profile_steps names, if any. `step` is what
    runs, `hardware` what predictions are made for; None: this CPU, measured."""

    def __init__(self, cfg: Config, rank: int, step: stages.Compiled, hardware: Hardware | None) -> None:
        self.cfg, self.rank, self.step, self.hardware = cfg, rank, step, hardware
        self.steps, self.kind = profiled(cfg), cfg.run.device.split(":")[0]
        self.running: Any = None
        self.ran = 0
        name = f"rank_{rank}_steps_{self.steps.start}_{self.steps.stop - 1}"
        self.table = Path(cfg.run.workdir) / "profile" / f"{name}.txt"
        self.target = self.table.with_suffix("" if self.kind == "npu" else ".json")

    def before(self, iteration: int) -> None:
        """Begin to profile if this iteration is the first to be profiled."""
        if iteration not in self.steps:
            return
        if self.running is None:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.running = self._profile()
            self.running.start()
        RANGES.on = True

    def after(self, iteration: int) -> bool:
        """Whether the trace was ended and written."""
        RANGES.on = False
        if self.running is None:
            return False
        self.ran += 1
        if iteration + 1 in self.steps:
            return False
        self.close()
        return True

    def close(self) -> None:
        """End a trace that is under way, whole or cut short by the end of the run."""
        if self.running is None:
            return
        if self.kind != "cpu":
            torch.get_device_module(self.kind).synchronize()
        running, self.running = self.running, None
        running.stop()
        if self.kind != "npu":
            aside = self.target.with_name(f".{self.target.name}")
            running.export_chrome_trace(str(aside))
            aside.replace(self.target)
        log.info("profile of iterations %d to %d: %s", self.steps.start, self.steps.stop - 1, self.target)
        self._compare()

    def _compare(self) -> None:
        """Write the table of measured and predicted milliseconds, and show its head."""
        if not self.ran:
            return
        if self.kind == "npu":
            kernels = profile_table.kernel_details(self.target, self.step.executable.scopes)
            if not kernels:
                log.warning("%s holds no kernel_details.csv: nothing to compare with the prediction", self.target)
                return
            with atomic(self.target / "scopes.json") as f:
                json.dump(profile_table.as_trace(kernels), f)
            measured = profile_table.of_kernels(kernels, self.ran)
        else:
            events = json.loads(self.target.read_text())["traceEvents"]
            measured = profile_table.of_trace(events, self.ran)
        lowered = self.step.lowered
        simulated = lowered.mesh.size if self.step.backend == "interpret" else 1  # devices that take turns
        measured = {key: seconds / simulated for key, seconds in measured.items()}
        hardware = self.hardware or named("cpu", self.cfg.model.compute_dtype)
        if dumps(self.cfg.run, self.rank):
            folder = dump.rank_folder(Path(self.cfg.run.dump_dir), self.rank)
            dump.write_measured(folder, lowered, measured, hardware)
        text = profile_table.as_text(profile_table.rows(measured, lowered, hardware), hardware)
        with atomic(self.table) as f:
            f.write(text)
        log.info("%s\n... all of it: %s", "\n".join(text.splitlines()[:12]), self.table)

    def _profile(self) -> Any:
        if self.kind == "npu":
            import torch_npu.profiler as profiler

            activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
            handler = profiler.tensorboard_trace_handler(str(self.target))
            return profiler.profile(activities=activities, on_trace_ready=handler)
        if self.kind == "cpu" and self.step.executable.local:
            log.info("several processes on CPUs: the trace has our ranges alone, torch's profiler breaks over gloo")
            return Timeline()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.kind == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        return torch.profiler.profile(activities=activities)
