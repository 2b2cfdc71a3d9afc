# %% [markdown]
# # Will LLaMA-65B fit on 32 Ascend 910B, how fast, and what goes over the wire?
#
# Answered from the step's graph; no weight is allocated.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt

from llama_fn import config, config_fields
from llama_fn.hardware import TABLE
from llama_fn.model import presets
from llama_fn.planner import plan, report
from sharding import Mesh

cfg = config_fields.with_values(
    config.Config(model=presets.preset("llama_65b")),
    {
        "model.compute_dtype": "bf16", "data.seq_len": 2048, "data.global_batch_size": 256, "data.microbatches": 32,
        "optim.reduce_per_microbatch": True, "mesh.axes": "data:4,model:8", "mesh.remat": "full", "mesh.regather": True,
    },
)  # fmt: skip
mesh, traces = Mesh.parse(cfg.mesh.axes), plan.Traces()
planned = plan.make(cfg, mesh, TABLE["ascend_910b1"], traces)
print(report.as_text(planned))
assert planned.fits

# %% [markdown]
# What if layers kept more? The trace is shared: a plan costs only the lowering.

# %%
for policy in ("dots", "none"):
    other = plan.make(replace(cfg, mesh=replace(cfg.mesh, remat=policy)), mesh, TABLE["ascend_910b1"], traces)
    print(f"{policy}: peak {other.peak_bytes / 1e9:.1f} GB, computing {other.compute_s:.1f} s, fits: {other.fits}")

# %% [markdown]
# Memory over the step.

# %%
plt.figure(figsize=(8, 3), layout="constrained")
plt.plot([moment.bytes / 1e9 for moment in planned.timeline])
plt.axhline(planned.hardware.hbm_bytes / 1e9, color="red", linewidth=1)
plt.xlabel("layers, in the order of the step")
plt.ylabel("GB")
plt.savefig("work/notebook/plan_65b.png")
