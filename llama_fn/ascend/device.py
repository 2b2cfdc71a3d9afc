"""This process's NPU."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_fn import compat
from llama_fn.ascend import environment, requirements
from llama_fn.config import RunConfig
from llama_fn.errors import UserError
from llama_fn.hardware import Hardware, identify, named
from llama_fn.launch import local_device

log = logging.getLogger("llama_fn.ascend")


def prepare(run: RunConfig, dump_to: Path | None = None) -> None:
    """Make the NPU of LOCAL_RANK this process's device, with torchair loaded and its environment set."""
    for line in environment.set_environment(run, dump_to):
        log.info("environment: %s", line)
    needed = list(requirements.on_this_machine())
    if not all(r.there for r in needed):
        raise UserError(
            "--run.backend=npu cannot run on this machine:\n" + requirements.as_text(needed) + "\n"
            "`python -m llama_fn.tools.check_npu` shows this again; --run.backend=inductor runs on CPU and CUDA"
        )
    logging.getLogger("torch_npu").setLevel(logging.WARNING)  # it logs every environment variable that anybody reads
    warnings.filterwarnings("ignore", message="`_get_pg_default_device` will be deprecated")  # asked by torchair
    compat.load_torchair()  # before our signal handlers: it installs its own
    npu: Any = torch.get_device_module("npu")
    npu.set_device(local_device(npu.device_count()))
    npu.manual_seed_all(run.seed)


def described(there: bool) -> tuple[Hardware, dict[str, str]]:
    """This process's NPU, made ready, in the table of hardware, and the versions of what drives it; where it is not
    `there`, a 910B1, for which graphs can be made."""
    versions = {"torch": torch.__version__, "torch_npu": compat.TORCH_NPU}
    if not there:
        compat.load_torchair()
        return named("ascend_910b1"), versions
    prepare(replace(RunConfig(), backend="npu", device="npu"))
    name = torch.get_device_module("npu").get_device_name()
    known = identify(name)
    if known is None:
        log.warning("%s is not in llama_fn/hardware.py: predictions are those of ascend_910b1", name)
    return known or named("ascend_910b1"), {**versions, "device": name, "cann": compat.cann_version()}
