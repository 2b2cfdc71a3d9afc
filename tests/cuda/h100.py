"""What inductor and Triton ask of a GPU while they compile, answered as an H100 would, so that a step's CUDA code is
made, and its kernels are built down to machine code, on a machine without a GPU and with torch's CPU build.

Nothing is run here: what loads a kernel or touches device memory is left out (interpreter.py runs it otherwise).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "wheels"))

import fetched

TRITON = "3.7.1"  # what torch 2.13.0's CUDA build requires
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20, is_integrated=0,
)  # fmt: skip


def prepare() -> tuple[Path, Path]:
    """The folder of Triton and the library that lets torch's CPU build speak of CUDA devices; fetched.Unavailable with
    the reason for none."""
    import torch

    folder = fetched.folder("llama_fn_cuda", "triton", TRITON)
    site = fetched.finished(folder / "site", lambda made: fetched.wheel("triton", TRITON, made))
    return site, fetched.finished(folder / f"guard-{torch.__version__}", _build) / "guard.so"


def _build(folder: Path) -> None:
    import torch

    installed = Path(torch.__file__).parent
    source = folder / "guard.cpp"
    source.write_text(GUARD)
    flags = ["-shared", "-fPIC", "-O1", "-w", "-std=c++20", f"-I{installed / 'include'}", f"-L{installed / 'lib'}"]
    command = ["g++", *flags, "-o", str(folder / "guard.so"), str(source), "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise fetched.Unavailable(f"the CUDA stand-in does not compile:\n{done.stderr[-2000:]}")


def environment(cache: Path) -> dict[str, str]:
    """For a process that calls `pretend`; compiled code goes to `cache`."""
    site, guard = prepare()
    path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(path), "GUARD": str(guard), "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"),
    }  # fmt: skip


def pretend(built: list[str]) -> None:
    """Be an H100 from now on, in this process. Names of kernels that were built come to `built`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    ctypes.CDLL(os.environ["GUARD"])
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_name": PROPERTIES.name, "get_device_properties": PROPERTIES, "is_initialized": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "synchronize": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.cuda.device = torch.cuda._DeviceGuard = lambda *_: nullcontext()  # type: ignore[assignment,misc]
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch._C._cuda_cudaCachingAllocator_is_enabled = lambda: True
    _build_only(built)


def _build_only(built: list[str]) -> None:
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    )
    triton_helpers.set_driver_to_gpu = lambda: None

    def loaded(kernel: Any) -> None:
        assert all(Path(each.kernel.cubin_path).stat().st_size for each in kernel.compile_results)
        built.append(kernel.inductor_meta["kernel_name"])
        kernel.launchers = [lambda *_, **__: None]

    triton_heuristics.CachingAutotuner._make_launchers = loaded
