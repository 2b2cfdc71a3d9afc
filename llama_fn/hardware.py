"""Peaks per device, each with its source. A device that is not here has none: MFU is unknown."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from llama_fn.errors import UserError, nearest

# What a byte costs in FLOP that could run meanwhile: bytes of HBM and of links against matrix FLOPs, about as they
# stand to each other on the devices below (910B1: 234 and 1900; A100: 153 and 1040; H100: 295 and 2200).
FLOPS_PER_HBM_BYTE, FLOPS_PER_LINK_BYTE = 200, 2000


@dataclass(frozen=True)
class Reserved:
    """Bytes of a device that a process cannot give to its step: what its runtime takes at start, and each communicator
    besides (one per group of devices that the step's collectives name, and the world's). `source` says from where."""

    runtime_bytes: float = 0.0
    communicator_bytes: float = 0.0
    source: str = "nothing is reserved"


@dataclass(frozen=True)
class Hardware:
    """Per device: FLOP/s for bf16 and fp16 with dense operands, HBM bytes and bytes/s, bytes/s that it can send inside
    a machine and between machines, and how many devices a machine has; `source` says where the numbers are printed.
    `reserved` is the part of HBM that is not the step's. `rated_flops_per_s`: those of the data sheet, from which MFU
    counts, where the FLOP/s are measured ones."""

    name: str
    peak_flops_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    source: str
    per_machine: int = 8
    reserved: Reserved = Reserved()
    rated_flops_per_s: float | None = None

    def reserved_bytes(self, communicators: int) -> float:
        """Of one device whose process is a member of so many groups."""
        return self.reserved.runtime_bytes + communicators * self.reserved.communicator_bytes


_CANN = (
    "Huawei figures for this 910B bin, dense FP16/BF16 cube units; memory and HCCS (a full mesh of 8, 7 links of 28 "
    "GB/s each way, a 200 Gb/s RoCE port per NPU) as published of the Atlas 800T A2, 800I A2 for B4; not measured by us"
)

_CANN_RESERVED = Reserved(
    1e9, 2 * 200 * 2**20,
    "1 GB for CANN's context and the workspaces of kernels (an estimate), and for each communicator 2 x HCCL_BUFFSIZE, "
    "200 MiB unless set (CANN's page of HCCL_BUFFSIZE); of 64 GB NPUs users report 0.4 to 3.1 GB beside torch's "
    "memory, communicators included (vllm-project/vllm-ascend#1127, sgl-project/sglang#29838)",
)  # fmt: skip
_CUDA_RESERVED = Reserved(
    1e9, 700e6,
    "1 GB for the CUDA context and the workspaces of libraries (0.3 to 0.5 GB of context with lazy loading, "
    "pytorch/pytorch#107667), and 0.7 GB for each NCCL communicator (544 to 688 MB on A100 with NVLink, "
    "NVIDIA/nccl#964)",
)  # fmt: skip
_CPU_RESERVED = Reserved(0.3e9, 0.0, "0.3 GB for Python and torch, resident once llama_fn.run.loop is imported")


def _ascend(name: str, flops: float, hbm_bytes: float = 64e9, hbm_bytes_per_s: float = 1.6e12) -> Hardware:
    return Hardware(name, flops, hbm_bytes, hbm_bytes_per_s, 196e9, 25e9, _CANN, reserved=_CANN_RESERVED)


TABLE = {
    h.name: h
    for h in (
        _ascend("ascend_910b1", 373.9e12),
        _ascend("ascend_910b2", 353.9e12),
        _ascend("ascend_910b3", 294.9e12),
        _ascend("ascend_910b4", 245.8e12, 32e9, 0.8e12),
        Hardware(
            "ascend_a3", 376e12, 64e9, 1.6e12, 196e9, 25e9,
            "one die of an Ascend 910C, a device to torch: half of 752 TFLOP/s dense BF16, 128 GB, 3.2 TB/s, "
            "392 GB/s each way over the bus of a supernode of 384, 400 Gb/s of RDMA (Zuo et al. 2025, Serving Large "
            "Language Models on Huawei CloudMatrix384); not measured by us", 768, _CANN_RESERVED,
        ),
        Hardware(
            "a100", 312e12, 80e9, 2.039e12, 300e9, 25e9,
            "NVIDIA A100 80GB SXM data sheet, dense BF16, NVLink 600 GB/s both ways; DGX A100: a 200 Gb/s port per GPU",
            reserved=_CUDA_RESERVED,
        ),
        Hardware(
            "h100", 989e12, 80e9, 3.35e12, 450e9, 50e9,
            "NVIDIA H100 SXM data sheet, dense BF16, NVLink 900 GB/s both ways; DGX H100: one 400 Gb/s port per GPU",
            reserved=_CUDA_RESERVED,
        ),
        Hardware(
            "h200", 989e12, 141e9, 4.8e12, 450e9, 50e9,
            "NVIDIA H200 SXM data sheet, dense BF16, NVLink 900 GB/s both ways; DGX H200: one 400 Gb/s port per GPU",
            reserved=_CUDA_RESERVED,
        ),
    )
}  # fmt: skip


def rates(device: str, dtype: str, side: int, elements: int) -> tuple[float, float]:
    """FLOP/s of products of `side` x `side` in `dtype`, and bytes/s of copies of `elements` floats, best of five."""
    import time

    import torch

    synchronize = torch.get_device_module(torch.device(device).type).synchronize

    def rate(fn: Callable[[], object], amount: float) -> float:
        best = float("inf")
        for _ in range(5):
            synchronize()
            began = time.perf_counter()
            fn()
            synchronize()
            best = min(best, time.perf_counter() - began)
        return amount / best

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    a, long = torch.ones(side, side, dtype=kind, device=device), torch.ones(elements, device=device)
    copy = torch.empty_like(long)
    return rate(lambda: a @ a, 2 * side**3), rate(lambda: copy.copy_(long), 2 * long.nbytes)


def this_cpu(dtype: str = "fp32") -> Hardware:
    """This machine, measured in a second: products of 2048 x 2048 in `dtype`, copies, and all of its memory.

    Several devices would be processes of this machine, whose links are its memory: half a copy's speed.
    """
    import torch

    products, copied = rates("cpu", dtype, 2048, 2**25)
    return Hardware(
        "cpu", products, total_bytes(), copied, copied / 2, copied / 2,
        f"measured now with {torch.get_num_threads()} threads, products in {dtype}", reserved=_CPU_RESERVED,
    )  # fmt: skip


def available_bytes() -> float:
    """Memory of this machine that a process may still take; all of it where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            line = next((text for text in lines if text.startswith("MemAvailable:")), "")
        return float(line.split()[1]) * 1024
    except (OSError, IndexError):
        return total_bytes()


def total_bytes() -> float:
    """Memory of this machine."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def named(name: str, dtype: str = "fp32") -> Hardware:
    """An entry of the table, or `cpu`: this machine, measured. UserError with the nearest name for an unknown one."""
    if name == "cpu":
        return this_cpu(dtype)
    if name not in TABLE:
        raise UserError(f"--hardware={name} is not in the table. {nearest(name, ['cpu', *TABLE])}")
    return TABLE[name]


def identify(device_name: str) -> Hardware | None:
    """The table's entry for a name as the driver prints it ("NVIDIA A100-SXM4-80GB", "Ascend910B1"), else None."""
    squeezed = device_name.lower().replace("_", "").replace(" ", "")
    for name, hardware in TABLE.items():
        if name.replace("_", "") in squeezed:
            return hardware
    return None
