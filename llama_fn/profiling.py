"""A trace of chosen iterations for Perfetto (ui.perfetto.dev): torch.profiler on CPU and CUDA, torch_npu's on an NPU.

Written as workdir/profile/rank_R_steps_A_B.json; on an NPU as the folder that torch_npu.profiler and MindStudio read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("llama_fn.profiling")


class Profiler:
    """Starts before the first and stops after the last of `steps`; does nothing for an empty range."""

    def __init__(self, steps: range, workdir: Path, rank: int, device: str) -> None:
        self.steps, self.kind = steps, device.split(":")[0]
        self.running: Any = None
        name = f"rank_{rank}_steps_{steps.start}_{steps.stop - 1}"
        self.target = workdir / "profile" / (name if self.kind == "npu" else f"{name}.json")

    def before(self, iteration: int) -> None:
        if iteration in self.steps and self.running is None:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.running = self._profile()
            self.running.start()

    def after(self, iteration: int) -> None:
        if self.running is not None and iteration + 1 not in self.steps:
            self.close()

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

    def _profile(self) -> Any:
        if self.kind == "npu":
            import torch_npu.profiler as profiler

            activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
            handler = profiler.tensorboard_trace_handler(str(self.target))
            return profiler.profile(activities=activities, on_trace_ready=handler)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.kind == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        return torch.profiler.profile(activities=activities)
