"""Predicted tokens/s per device against what others published: python benchmarks/published.py

Every row is llama_fn/planner/plan.py as it is, with the published peaks of the hardware and no constant fitted to a
row. The layouts are ours, as near to theirs as ours come. docs/plan.md explains the differences.
"""

from __future__ import annotations

from dataclasses import replace

from llama_fn import config, config_fields
from llama_fn.hardware import TABLE, Hardware
from llama_fn.model import flops, presets
from llama_fn.planner import plan
from sharding import Mesh

OTHERS = {  # devices that we do not run on, and a peak that we do not use
    "tpu_v5p": Hardware("tpu_v5p", 459e12, 95e9, 2.765e12, 600e9, 6.25e9, "Google Cloud's page of TPU v5p", 8960),
    "tpu_v5e": Hardware("tpu_v5e", 197e12, 16e9, 0.859e12, 200e9, 3.125e9, "Google Cloud's page of TPU v5e", 256),
    "h100_fp8": replace(TABLE["h100"], name="h100_fp8", peak_flops_per_s=1979e12),  # the same data sheet, dense FP8
}

# who, preset, devices' mesh, rules, hardware, sequences per device and microbatch, microbatches, length, remat, and
# tokens/s per device as published; a number below 1 is the MFU. Pipelines with several chunks say so after their mesh.
ASCEND, MEGATRON = "AscendSpeed", "Megatron (NeMo)"
ROWS = [
    (ASCEND, "llama_7b", "data:8", "fsdp", "ascend_910b1", 2, 4, 2048, "dots", 3763),
    (ASCEND, "llama_13b", "data:8", "fsdp", "ascend_910b1", 2, 4, 2048, "dots", 1894),
    (ASCEND, "llama_33b", "data:8,model:4", "fsdp_tp", "ascend_910b1", 4, 8, 2048, "dots", 621),
    (ASCEND, "llama_65b", "data:4,model:8", "fsdp_tp", "ascend_910b1", 4, 16, 2048, "dots", 348),
    (ASCEND, "llama_33b", "pipe:4,data:2,model:4", "fsdp_tp", "ascend_910b1", 4, 64, 2048, "none", 621),
    (ASCEND, "llama_65b", "pipe:4,model:8", "tp_sp", "ascend_910b1", 1, 256, 2048, "full", 348),
    ("MindFormers", "llama2_70b", "pipe:8,model:4", "tp_sp", "ascend_910b1", 1, 256, 4096, "full", 404),
    ("MindSpeed", "llama2_70b", "pipe:4,model:8 x 4", "tp_sp", "ascend_910b1", 1, 1024, 4096, "none", 439),
    ("torchtitan", "llama3_8b", "data:64", "fsdp", "a100", 1, 1, 8192, "dots", 2973),
    ("torchtitan", "llama_13b", "data:64", "fsdp", "a100", 2, 1, 4096, "none", 2162),
    ("torchtitan", "llama2_70b", "data:64", "fsdp", "a100", 2, 1, 4096, "full", 353),
    ("MaxText", "llama2_70b", "data:64", "fsdp", "tpu_v5p", 4, 1, 4096, "full", 0.65),
    ("MaxText", "llama2_70b", "data:256", "fsdp", "tpu_v5e", 1, 1, 4096, "full", 0.57),
    (MEGATRON, "llama_7b", "data:8", "fsdp", "h100_fp8", 1, 16, 4096, "none", 16934),
    (MEGATRON, "llama3_8b", "data:8", "fsdp", "h100_fp8", 1, 16, 8192, "dots", 12273),
    (MEGATRON, "llama2_70b", "data:16,model:4", "fsdp_tp", "h100_fp8", 2, 4, 4096, "dots", 1728),
    (MEGATRON, "llama2_70b", "pipe:4,data:4,model:4 x 5", "fsdp_tp", "h100_fp8", 1, 32, 4096, "none", 1728),
]


def main() -> None:
    names = (
        "whose",
        "model",
        "mesh",
        "hardware",
        "remat",
        "GB",
        "computing",
        "sending",
        "simulated",
        "alone",
        "published",
    )
    print("| " + " | ".join(names) + " | published / simulated |\n|" + " --- |" * (len(names) + 1))
    for who, preset, axes, rules, hardware, sequences, microbatches, length, remat, published in ROWS:
        laid, _, chunks = axes.partition(" x ")
        mesh = Mesh.parse(laid)
        piped = "pipe" in dict(mesh.axes)
        size = dict(mesh.axes).get("data", 1) * sequences * microbatches
        cfg = config_fields.with_values(
            config.Config(model=presets.preset(preset)),
            {
                "model.compute_dtype": "bf16", "data.seq_len": length, "data.global_batch_size": size,
                "data.microbatches": microbatches, "mesh.axes": laid, "mesh.rules": rules, "mesh.remat": remat,
                "mesh.regather": not piped, "optim.reduce_per_microbatch": microbatches > 1 and not piped,
                "mesh.chunks": int(chunks or 1), "mesh.schedule": "interleaved" if chunks else "1f1b",
            },
        )  # fmt: skip
        device = {**TABLE, **OTHERS}[hardware]
        p = plan.make(cfg, mesh, device)
        if published < 1:
            published *= device.peak_flops_per_s / flops.model_flops_per_token(cfg.model, length)
        tokens = size * length / mesh.size
        speeds = [tokens / seconds for seconds in (p.compute_s, p.comms_s, p.step_time_s, p.step_time_alone_s)]
        shown = " | ".join(f"{speed:,.0f}" for speed in speeds)
        what = f"| {who} | {preset} | {axes} | {hardware} | {remat} | {p.peak_bytes / 1e9:.0f} |"
        print(f"{what} {shown} | {published:,.0f} | {published / speeds[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
