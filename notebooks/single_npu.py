# %% [markdown]
# # One device: an NPU if there is one, else CUDA, else this CPU
#
# The same step on whatever is here.

# %%
import importlib.util
from pathlib import Path

import torch

from llama_fn import config
from llama_fn.model import arrays, random, train_step
from llama_fn.planner import config_stages

device, backend = "cpu", "inductor"
if torch.cuda.is_available():
    device = "cuda"
elif importlib.util.find_spec("torch_npu"):
    import torch_npu  # noqa: F401

    if torch.npu.is_available():
        device, backend = "npu:0", "npu"
print(f"device {device}, backend {backend}")

# %%
cfg = config.Config(
    model=config.ModelConfig(
        num_layers=2, embed_dim=128, num_heads=4, num_kv_heads=4, mlp_dim=344, vocab_size=512, compute_dtype="bf16"
    ),
    data=config.DataConfig(seq_len=64, global_batch_size=4),
)
options = {"device": device} | ({"cache": Path("work/notebook/compiled")} if backend == "inductor" else {})
step = config_stages.train(cfg).lower().compile(backend, **options)

# %%
state = arrays.materialize(train_step.abstract_state(cfg), random.key(0), device)
ids = torch.randint(0, cfg.model.vocab_size, (1, cfg.data.global_batch_size, cfg.data.seq_len + 1)).to(device)
batch = train_step.Batch(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), torch.ones_like(ids[..., 1:]).float())
hyper = train_step.hyperparameters(cfg, device)
losses = []
for _ in range(20):
    state, metrics = step(state, batch, hyper)
    losses.append(metrics["lm_loss"].item())
print(f"loss on one batch {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]

# %% [markdown]
# What runs: on an NPU the GE graph, a line per op; else the graph that inductor compiled.

# %%
print("\n".join(step.as_text().splitlines()[:40:4]))
