"""Predicted tokens/s per device against what others published: python benchmarks/published.py

Every row is llama_fn/plan.py as it is, with the published peaks of the hardware and no constant fitted to a row. The
layouts are ours, as near to theirs as ours come. docs/plan.md explains the differences.
"""

from __future__ import annotations

from llama_fn import config, plan
from llama_fn.hardware import TABLE
from sharding import Mesh

# who, preset, devices' mesh, rules, hardware, sequences per device and microbatch, microbatches, length, published
ASCEND = "AscendSpeed"
ROWS = [
    (ASCEND, "llama_7b", "data:8", "fsdp", "ascend_910b1", 2, 4, 2048, "dots", 3763),
    (ASCEND, "llama_13b", "data:8", "fsdp", "ascend_910b1", 2, 4, 2048, "dots", 1894),
    (ASCEND, "llama_33b", "data:8,model:4", "fsdp_tp", "ascend_910b1", 2, 16, 2048, "dots", 621),
    (ASCEND, "llama_65b", "data:4,model:8", "fsdp_tp", "ascend_910b1", 2, 32, 2048, "dots", 348),
    ("torchtitan", "llama3_8b", "data:64", "fsdp", "a100", 1, 1, 8192, "dots", 2973),
    ("torchtitan", "llama_13b", "data:64", "fsdp", "a100", 2, 1, 4096, "none", 2162),
    ("torchtitan", "llama2_70b", "data:64", "fsdp", "a100", 2, 1, 4096, "full", 353),
]


def main() -> None:
    names = ("whose", "model", "mesh", "hardware", "remat", "GB", "computing", "sending", "hidden", "not", "published")
    print("| " + " | ".join(names) + " | published / hidden |\n|" + " --- |" * (len(names) + 1))
    for who, preset, axes, rules, hardware, sequences, microbatches, length, remat, published in ROWS:
        mesh = Mesh.parse(axes)
        size = dict(mesh.axes)["data"] * sequences * microbatches
        cfg = config.with_values(
            config.Config(model=config.preset(preset)),
            {
                "model.compute_dtype": "bf16", "data.seq_len": length, "data.global_batch_size": size,
                "data.microbatches": microbatches, "mesh.rules": rules, "mesh.remat": remat, "mesh.regather": True,
                "optim.reduce_per_microbatch": microbatches > 1,
            },
        )  # fmt: skip
        p = plan.make(cfg, mesh, TABLE[hardware])
        tokens = size * length / mesh.size
        speeds = [tokens / seconds for seconds in (p.compute_s, p.comms_s, p.step_time_s, p.step_time_alone_s)]
        shown = " | ".join(f"{speed:,.0f}" for speed in speeds)
        what = f"| {who} | {preset} | {axes} | {hardware} | {remat} | {p.peak_bytes / 1e9:.0f} |"
        print(f"{what} {shown} | {published:,} | {published / speeds[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
