"""What tests/npu lowers: one job per name, as worker.py takes them."""

from __future__ import annotations

from llama_fn import config, config_fields
from llama_fn.model import presets

TINY = {"model.preset": "llama_tiny"}
DTYPES = ("fp32", "bf16", "fp16")
# Of these, llama3_8b is lowered on every commit: with grouped heads, another vocabulary and theta. The rest have the
# ops of llama_65b's 8 layers, and are lowered by `make nightly`, as are the twins of other jobs.
SHAPES = ("llama_60m", "llama_1b", "llama_7b", "llama_13b", "llama_33b", "llama_65b", "llama2_70b", "llama3_8b")

NIGHTLY = {f"shape_{name}" for name in SHAPES[:6]} | {
    "tiny_fp16", "tiny_fp32_data2_model4", "tiny_2_ranks", "tiny_one_stream", "65b_fused", "tiny_variants",
    "tiny_pipeline_whole", "tiny_pipeline_bf16", "tiny_remat", "tiny_bf16_data2_model4", "shape_llama2_70b",
    "65b_8layers",
}  # fmt: skip


def job(mesh: str = "", ranks: int = 1, rules: str = "fsdp_tp", fuse: bool = False, **values) -> dict:
    named = {name.replace("__", "."): value for name, value in values.items()}
    where = {"mesh.axes": mesh, "mesh.rules": rules, "mesh.fuse": fuse}
    return {"config": {**TINY, **where, **named}, "ranks": list(range(ranks))}


def in_microbatches(mesh: str, ranks: int, count: int, **values) -> dict:
    """Of one short sequence each."""
    sizes = {"data__seq_len": 32, "data__microbatches": count, "data__global_batch_size": count}
    return job(mesh, ranks, model__num_layers=2, **sizes, **values)


def config_of(given: dict) -> config.Config:
    values = dict(given["config"])
    cfg = config.Config(model=presets.preset(values.pop("model.preset")))
    return config_fields.with_values(cfg, values)


JOBS = {
    **{f"tiny_{d}": job(model__compute_dtype=d, data__seq_len=64) for d in DTYPES},
    **{f"tiny_{d}_data2_model4": job("data:2,model:4", model__compute_dtype=d) for d in ("fp32", "bf16")},
    "tiny_2_ranks": job("model:2", 2, data__seq_len=64, model__num_layers=2),
    "tiny_4_ranks": job("data:2,model:2", 4, data__seq_len=64, model__num_layers=2),
    "tiny_ulysses": job("context:2", 2, "fsdp_tp_ulysses", data__seq_len=64, model__num_layers=2),
    "tiny_calls": in_microbatches("model:2", 2, 6, run__npu_form="calls"),
    "tiny_pipeline": in_microbatches("pipe:2", 2, 4, run__npu_form="calls"),
    "tiny_pipeline_whole": in_microbatches("pipe:2,model:2", 4, 3, mesh__schedule="zb_h1", run__npu_form="whole"),
    "tiny_pipeline_bf16": in_microbatches(
        "pipe:2", 2, 2, model__compute_dtype="bf16", run__npu_form="whole", mesh__schedule="gpipe"
    ),
    "tiny_one_stream": in_microbatches("model:2", 2, 1, run__npu_streams="one"),
    "tiny_fp16_gqa": job(
        model__compute_dtype="fp16", model__num_kv_heads=2, model__num_layers=2, data__seq_len=16, data__microbatches=2
    ),
    "tiny_remat": job(
        "data:2",
        2,
        data__seq_len=64,
        data__microbatches=2,
        model__num_layers=2,
        mesh__remat="full",
        mesh__regather=True,
    ),
    "tiny_variants": job(
        "model:2",
        2,
        model__qkv_bias=True,
        model__qk_norm=True,
        model__rope_factor=8.0,
        model__head_size=32,
        model__num_layers=2,
        data__seq_len=64,
    ),
    "tiny_segments": job(data__segments=True, model__num_layers=2, model__num_kv_heads=2, data__seq_len=32),
    "tiny_fused": job(
        "model:2",
        2,
        "tp_sp",
        True,
        model__compute_dtype="bf16",
        model__num_layers=2,
        data__seq_len=64,
        data__global_batch_size=1,
    ),
    "65b_8layers": job("data:1,model:8", model__preset="llama_65b_8layers", model__compute_dtype="bf16"),
    "65b_fused": job(
        "data:8,model:4",
        fuse=True,
        model__preset="llama_65b_8layers",
        model__num_layers=2,
        model__compute_dtype="bf16",
        data__seq_len=512,
    ),
    **{
        # One sequence per device: what a batch of 8 over data:8 leaves.
        f"shape_{name}": job(
            "data:8,model:4", model__preset=name, model__num_layers=1, model__compute_dtype="bf16", data__seq_len=512
        )
        for name in SHAPES
    },
}
