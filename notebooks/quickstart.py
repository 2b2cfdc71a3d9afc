# %% [markdown]
# # Train a LLaMA in a notebook
#
# The step is a pure function that becomes one graph: `trace` -> `lower` -> `compile`. Here: 100 steps of a small model
# on Python's own library, and the loss.

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt

from llama_fn import config, config_checks
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import open_parts
from llama_fn.model import arrays, random, train_step
from llama_fn.planner import config_stages
from llama_fn.run import runtime

STEPS = 100
cfg = config_checks.resolved(
    config.Config(
        model=config.ModelConfig(
            num_layers=2, embed_dim=128, num_heads=4, num_kv_heads=4, mlp_dim=344, vocab_size=1024
        ),
        data=config.DataConfig(seq_len=64, global_batch_size=8),
        optim=config.OptimConfig(lr=3e-3, warmup_steps=10),
        run=config.RunConfig(steps=STEPS, workdir="work/notebook"),
    )
)
runtime.setup(cfg.run)
train_data = open_parts(cfg, Path(cfg.run.workdir)).train_samples(cfg, consumed=0, left=STEPS)

# %% [markdown]
# The stages. Each prints itself and answers `cost_analysis()` and `memory_analysis()`.

# %%
traced = config_stages.train(cfg)
lowered = traced.lower()
print("\n".join(lowered.as_text().splitlines()[:60:6]))
print(lowered.memory_analysis())
step = lowered.compile("inductor", cache=Path("work/notebook/compiled"))

# %% [markdown]
# The loop: the state goes in and comes out; its buffers are donated, so the old one is gone.

# %%
state = arrays.materialize(train_step.abstract_state(cfg), random.key(0))
d = cfg.data
batches = BatchIterator(train_data, d.global_batch_size, d.microbatches, cfg.model.vocab_size)
hyper = train_step.hyperparameters(cfg)  # learning rates and the like: other numbers need no other graph
losses = []
for _ in range(STEPS):
    state, metrics = step(state, next(batches), hyper)
    losses.append(metrics["lm_loss"].item())
batches.close()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.8 * losses[0]

# %%
plt.figure(figsize=(7, 3), layout="constrained")
plt.plot(range(1, STEPS + 1), losses)
plt.xlabel("iteration")
plt.ylabel("loss, nats per token")
plt.savefig("work/notebook/loss.png")

# %% [markdown]
# Another shape is another `replace`; nothing else changes.

# %%
deeper = replace(cfg, model=replace(cfg.model, num_layers=4))
print(config_stages.train(deeper).lower().cost_analysis().total_flops / lowered.cost_analysis().total_flops)
