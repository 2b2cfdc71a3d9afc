"""check_npu on a machine whose CANN is the stand-in: it has everything but a device."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch_npu  # noqa: F401

from llama_fn.ascend import requirements
from llama_fn.ascend.requirements import Requirement

sys.argv[0] = "check_npu"
torch.npu.current_device()  # as a toolkit whose runtime finds a device type; meta functions ask for its name
requirements.on_this_machine = lambda: iter(
    Requirement(what, what != "device", "the stand-in's", "") for what in ("torch_npu", "CANN", "driver", "device")
)
runpy.run_module("llama_fn.tools.check_npu", run_name="__main__")
