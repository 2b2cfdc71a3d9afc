"""Temperature, power and memory errors of this process's device, where its vendor's library or tool gives them.

CUDA: NVML, through nvidia-ml-py (extra nvml). Ascend: the tool npu-smi, whose answers are lines of "name : number".
Errors are the uncorrectable ones of the memory (ECC, two bits) since the driver was loaded.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from typing import Any

from llama_fn.launch import launched

TIMEOUT_S = 10
_LINES = {
    "temperature_c": re.compile(r"^\s*(?:NPU )?Temperature ?\(C\)\s*:\s*([\d.]+)", re.M),
    "power_w": re.compile(r"^\s*(?:NPU Real-time Power|Power Dissipation)\(W\)\s*:\s*([\d.]+)", re.M),
    "memory_errors": re.compile(r"^\s*HBM Double Bit Error Count\s*:\s*(\d+)", re.M),
}


def read(device: str) -> dict[str, float]:
    """What is known, by name; nothing on a CPU."""
    kind = device.split(":")[0]
    if kind == "cuda":
        return _nvml()
    return _npu_smi(_number("ASCEND_RT_VISIBLE_DEVICES")) if kind == "npu" else {}


def _number(variable: str) -> int:
    """Of this process's device on its machine: LOCAL_RANK's of those that are visible."""
    local, visible = launched().local_rank, [x.strip() for x in os.environ.get(variable, "").split(",") if x.strip()]
    return int(visible[local]) if local < len(visible) and visible[local].isdigit() else local


def _nvml() -> dict[str, float]:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return {}
    found: dict[str, float] = {}
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(_number("CUDA_VISIBLE_DEVICES"))
        found["temperature_c"] = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        found["power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        found["memory_errors"] = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    except nvml.NVMLError:  # a card without ECC, or a driver that says less
        pass
    return found


def _npu_smi(number: int) -> dict[str, float]:
    if shutil.which("npu-smi") is None:
        return {}
    said = ""
    for what in ("common", "ecc"):
        try:
            words = ["npu-smi", "info", "-t", what, "-i", str(number)]
            said += subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S).stdout + "\n"
        except (OSError, subprocess.TimeoutExpired):  # in containers it may not be allowed, or hang with its driver
            return {}
    return {name: float(match[1]) for name, pattern in _LINES.items() if (match := pattern.search(said))}
