"""Peak dense matrix FLOP/s per device, each with its source. A device that is not here has no peak: MFU is unknown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """`peak_flops_per_s` for bf16 and fp16 with dense operands; `source` says where the number is printed."""

    name: str
    peak_flops_per_s: float
    source: str


_CANN = "Huawei figure for the dense FP16/BF16 cube units of this 910B bin"
TABLE = {
    h.name: h
    for h in (
        Hardware("ascend_910b1", 373.9e12, _CANN),
        Hardware("ascend_910b2", 353.9e12, _CANN),
        Hardware("ascend_910b3", 294.9e12, _CANN),
        Hardware("ascend_910b4", 245.8e12, _CANN),
        Hardware("a100", 312e12, "NVIDIA A100 data sheet, dense BF16"),
        Hardware("h100", 989e12, "NVIDIA H100 SXM data sheet, dense BF16"),
        Hardware("h200", 989e12, "NVIDIA H200 SXM data sheet, dense BF16"),
    )
}


def identify(device_name: str) -> Hardware | None:
    """The table's entry for a name as the driver prints it ("NVIDIA A100-SXM4-80GB", "Ascend910B1"), else None."""
    squeezed = device_name.lower().replace("_", "").replace(" ", "")
    for name, hardware in TABLE.items():
        if name.replace("_", "") in squeezed:
            return hardware
    return None
