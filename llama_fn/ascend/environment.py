"""Ascend NPUs: what a machine needs to have, its environment variables, and this process's device.

Nothing here imports torch_npu before `prepare`, which says precisely what is missing.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_fn import compat
from llama_fn.config import RunConfig
from llama_fn.errors import UserError, nearest
from llama_fn.launch import launched

log = logging.getLogger("llama_fn.ascend")

DRIVER = Path("/usr/local/Ascend/driver")


@dataclass(frozen=True)
class Variable:
    """An environment variable: what it is set to where unset (None: left alone), what is allowed, what it does."""

    name: str
    default: str | None
    allowed: range | tuple[str, ...] | None
    meaning: str

    def refused(self, value: str) -> str:
        """What is wrong with a value, "" if nothing is."""
        if isinstance(self.allowed, range):
            good = value.isascii() and value.isdigit() and int(value) in self.allowed
            return "" if good else f"an integer of {self.allowed.start}..{self.allowed.stop - 1}"
        return "" if self.allowed is None or value in self.allowed else " or ".join(self.allowed)


# The one table; docs/ascend.md is checked against it.
VARIABLES = (
    Variable("HCCL_CONNECT_TIMEOUT", "1200", range(120, 7201), "seconds in which all ranks must reach their first "
             "collective; HCCL's own 120 are too short where one rank compiles longer than the others"),
    Variable("HCCL_EXEC_TIMEOUT", "544", range(0, 17341), "seconds a collective may take before HCCL gives up; the "
             "largest multiple of 68 that lies 30 below --run.timeout_s, so that HCCL reports first"),
    Variable("TORCH_HCCL_ASYNC_ERROR_HANDLING", "1", ("0", "1"), "end the process when a collective fails in the "
             "background"),
    Variable("HCCL_DETERMINISTIC", "false", ("false", "true", "strict"), "sums over ranks in a fixed order; true under "
             "--run.deterministic"),
    Variable("TASK_QUEUE_ENABLE", "1", ("0", "1", "2"), "launch operators outside of the graph from a second thread"),
    Variable("COMBINED_ENABLE", None, ("0", "1"), "join operators on non-contiguous tensors; the graph has none"),
    Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", None, "torch_npu's allocator"),
    Variable("CPU_AFFINITY_CONF", "1", None, "bind each process to the cores near its NPU"),
    Variable("NPU_ASD_ENABLE", None, ("0", "1", "2", "3"), "torch_npu's search for silent data corruption; our step "
             "refuses non-finite gradients itself"),
    Variable("ASCEND_HOME_PATH", None, None, "where CANN is installed; set by CANN's set_env.sh"),
)  # fmt: skip


def set_environment(run: RunConfig, dump_to: Path | None, environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Default what is unset, check what is set; a line per variable that has a value. `dump_to`: folder that gets what
    CANN dumps of its graphs.

    UserError for a value that is not allowed, and for a name that is nearly one of ours: HEEL_CONNECT_TIMEOUT does
    nothing.
    """
    for name in environ:
        if name.startswith(("HEEL_", "HCLL_", "HCL_")):
            raise UserError(f"environment variable {name} does nothing. {nearest(name, [v.name for v in VARIABLES])}")
    lines = []
    from_flags = {"HCCL_EXEC_TIMEOUT": str(max(1, (run.timeout_s - 30) // 68) * 68)}
    if run.deterministic:
        from_flags["HCCL_DETERMINISTIC"] = "true"
    for variable in VARIABLES:
        default = from_flags.get(variable.name, variable.default)
        given = environ.get(variable.name)
        if given is None and default is not None:
            environ[variable.name] = default
        value = environ.get(variable.name)
        if value is not None and (wanted := variable.refused(value)):
            raise UserError(f"environment variable {variable.name}={value}: expected {wanted} ({variable.meaning})")
        if value is not None:
            lines.append(f"{variable.name}={value}{' (default of llama_fn)' if given is None else ''}")
    if dump_to is not None:
        folder = dump_to.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        environ.setdefault("DUMP_GE_GRAPH", "2")  # graphs without weights
        environ["DUMP_GRAPH_PATH"] = str(folder)
        lines += [f"DUMP_GE_GRAPH={environ['DUMP_GE_GRAPH']}", f"DUMP_GRAPH_PATH={folder}"]
    return lines


@dataclass(frozen=True)
class Finding:
    """One thing that a machine needs: whether it is there, what was seen, and what to do if it is not."""

    what: str
    found: bool
    seen: str
    advice: str


def diagnose() -> Iterator[Finding]:
    """torch_npu, CANN, driver and device, each looked for without the others."""
    yield _torch_npu()
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    loads = _loads("libascendcl.so")
    seen = f"{home or 'ASCEND_HOME_PATH is not set'}, libascendcl.so {'loads' if loads else 'does not load'}"
    yield Finding(
        "CANN", loads, seen,
        "install the CANN toolkit and kernels that BUILD.md names and run `source .../ascend-toolkit/set_env.sh`",
    )  # fmt: skip
    version = DRIVER / "version.info"
    yield Finding(
        "driver", version.exists(), str(version) if version.exists() else f"no {version}",
        "install Huawei's driver and firmware for this NPU as root (BUILD.md), then reboot",
    )  # fmt: skip
    devices = sorted(p.name for p in Path("/dev").glob("davinci[0-9]*"))
    yield Finding(
        "device", bool(devices), ", ".join(devices) or "no /dev/davinci0",
        "check `npu-smi info`; in a container pass the devices through (--device=/dev/davinci0 ... and "
        "/dev/davinci_manager, /dev/devmm_svm, /dev/hisi_hdc)",
    )  # fmt: skip


def _torch_npu() -> Finding:
    advice = f"pip install 'llama_fn[npu]', which installs torch_npu {compat.TORCH_NPU}"
    if importlib.util.find_spec("torch_npu") is None:
        return Finding("torch_npu", False, "not installed", advice)
    version = importlib.metadata.version("torch_npu")
    return Finding("torch_npu", version.startswith(compat.TORCH_NPU), version, advice)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def missing_text(findings: list[Finding]) -> str:
    """One paragraph: what is there, what is not, and what to do about it."""
    lines = [f"  {f.what}: {f.seen}" + ("" if f.found else f"; missing: {f.advice}") for f in findings]
    return "\n".join(lines)


def prepare(run: RunConfig, dump_to: Path | None = None) -> None:
    """Make the NPU of LOCAL_RANK this process's device, with torchair loaded and its environment set."""
    for line in set_environment(run, dump_to):
        log.info("environment: %s", line)
    findings = list(diagnose())
    if not all(f.found for f in findings):
        raise UserError(
            "--run.backend=npu cannot run on this machine:\n" + missing_text(findings) + "\n"
            "`python -m llama_fn.tools.check_npu` shows this again; --run.backend=inductor runs on CPU and CUDA"
        )
    logging.getLogger("torch_npu").setLevel(logging.WARNING)  # it logs every environment variable that anybody reads
    warnings.filterwarnings("ignore", message="`_get_pg_default_device` will be deprecated")  # asked by torchair
    compat.load_torchair()  # before our signal handlers: it installs its own
    npu: Any = torch.get_device_module("npu")
    npu.set_device(local_device(npu.device_count()))
    npu.manual_seed_all(run.seed)


def local_device(count: int) -> int:
    """LOCAL_RANK, the device of this process on its machine; UserError where the machine has fewer."""
    local = launched().local_rank
    if local >= count:
        raise UserError(
            f"LOCAL_RANK={local}, but this machine shows {count} devices: start at most {count} processes on it "
            f"(torchrun --nproc_per_node={count}), or free hidden devices (ASCEND_RT_VISIBLE_DEVICES, "
            "CUDA_VISIBLE_DEVICES)"
        )
    return local
