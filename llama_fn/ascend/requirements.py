"""What a machine needs before an NPU runs anything: torch_npu, CANN, driver, device. Nothing here imports torch_npu."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_fn import compat

DRIVER = Path("/usr/local/Ascend/driver")


@dataclass(frozen=True)
class Requirement:
    """One thing that a machine needs: whether it is there, what was seen, and what to do if it is not."""

    what: str
    there: bool
    seen: str
    advice: str


def on_this_machine() -> Iterator[Requirement]:
    """torch_npu, CANN, driver and device, each looked for without the others."""
    yield _torch_npu()
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    loads = _loads("libascendcl.so")
    seen = f"{home or 'ASCEND_HOME_PATH is not set'}, libascendcl.so {'loads' if loads else 'does not load'}"
    yield Requirement(
        "CANN", loads, seen,
        "install the CANN toolkit and kernels that BUILD.md names and run `source .../ascend-toolkit/set_env.sh`",
    )  # fmt: skip
    version = DRIVER / "version.info"
    yield Requirement(
        "driver", version.exists(), str(version) if version.exists() else f"no {version}",
        "install Huawei's driver and firmware for this NPU as root (BUILD.md), then reboot",
    )  # fmt: skip
    devices = sorted(p.name for p in Path("/dev").glob("davinci[0-9]*"))
    yield Requirement(
        "device", bool(devices), ", ".join(devices) or "no /dev/davinci0",
        "check `npu-smi info`; in a container pass the devices through (--device=/dev/davinci0 ... and "
        "/dev/davinci_manager, /dev/devmm_svm, /dev/hisi_hdc)",
    )  # fmt: skip


def _torch_npu() -> Requirement:
    advice = f"pip install 'llama_fn[npu]', which installs torch_npu {compat.TORCH_NPU}"
    if importlib.util.find_spec("torch_npu") is None:
        return Requirement("torch_npu", False, "not installed", advice)
    version = importlib.metadata.version("torch_npu")
    return Requirement("torch_npu", version.startswith(compat.TORCH_NPU), version, advice)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def as_text(requirements: list[Requirement]) -> str:
    """One paragraph: what is there, what is not, and what to do about it."""
    lines = [f"  {f.what}: {f.seen}" + ("" if f.there else f"; missing: {f.advice}") for f in requirements]
    return "\n".join(lines)
