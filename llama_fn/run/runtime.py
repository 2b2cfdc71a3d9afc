"""The process around the run: threads, allocator, device, logging to the terminal, and signals."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from llama_fn import compat, hardware
from llama_fn.ascend import device as npu_device
from llama_fn.config import RunConfig
from llama_fn.config_checks import dumps
from llama_fn.errors import FULL_DISK, UserError
from llama_fn.inspect import dump
from llama_fn.launch import launched, local_device

log = logging.getLogger("llama_fn")


def setup(run: RunConfig) -> hardware.Hardware | None:
    """Threads, memory and device as the flags say; returns the device's entry in the hardware table, if any."""
    launch = launched()
    compat.check_torch_version()
    compat.keep_memory()
    report_full_disk_once()
    torch.set_num_threads(run.threads or max(1, compat.physical_cores() // launch.local_world))
    torch.manual_seed(run.seed)  # the step draws nothing; what a user adds does
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    kind = run.device.split(":")[0]
    if kind == "cpu":
        return None
    if kind == "npu":  # torch knows the name once torch_npu is there
        folder = dump.rank_folder(Path(run.dump_dir), launch.rank) if dumps(run, launch.rank) else None
        npu_device.prepare(run, folder / dump.GE_OWN if folder else None)
        return hardware.identify(torch.get_device_module("npu").get_device_name())
    if not torch.cuda.is_available():
        raise UserError(
            f"--run.device={run.device}: torch {torch.__version__} finds no CUDA device. Install the CUDA build of "
            "torch (BUILD.md) and check nvidia-smi, or use --run.device=cpu"
        )
    device = torch.device(run.device)
    torch.cuda.set_device(device.index if device.index is not None else local_device(torch.cuda.device_count()))
    return hardware.identify(torch.cuda.get_device_name())


def memory_text(device: str) -> str:
    """The peak of this process's device memory so far, "" on a CPU."""
    kind = device.split(":")[0]
    if kind == "cpu":
        return ""
    statistics = torch.get_device_module(kind)
    allocated, reserved = statistics.max_memory_allocated(), statistics.max_memory_reserved()
    return f"peak device memory {allocated / 1e9:.2f} GB allocated, {reserved / 1e9:.2f} GB reserved"


def report_full_disk_once() -> None:
    """One line instead of a traceback where a background thread (TensorBoard's writer) finds the disk full; the main
    thread meets the same disk at its next line or checkpoint and ends the run."""
    shown = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError) and args.exc_value.errno in FULL_DISK:
            log.error("a writer in the background stopped: %s", args.exc_value)
        else:
            shown(args)

    threading.excepthook = hook


# Who warns of the step and the run, which are the same for all processes, and not of this one or its machine.
_ALIKE = {f"llama_fn.{name}" for name in ("lints", "ir", "lowering", "inductor", "npu", "resume", "loop", "health")}


def log_to_terminal(console: Any | None, quiet: bool = False) -> None:
    """Plain lines on standard error; through rich's console where a progress display shares the terminal. `quiet`:
    errors, and warnings that the first process does not say as well, for the processes that are not the first."""
    root = logging.getLogger("llama_fn")
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    root.propagate = False
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if console is not None:
        from rich.logging import RichHandler

        handler = RichHandler(console=console, show_path=False, show_level=False)
    if quiet:
        handler.addFilter(lambda record: record.levelno > logging.WARNING or record.name not in _ALIKE)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.handlers[:] = [handler]
