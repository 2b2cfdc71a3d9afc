# %% [markdown]
# # Find a bug in a step's graph
#
# A variant of the model sends more than it should. The stages, a dump, a difference in words, and the line that asked.

# %%
from pathlib import Path

from kernels.scope_names import layer, microbatch, without_numbers
from llama_fn import config
from llama_fn.compiler import stages
from llama_fn.inspect import dump
from llama_fn.inspect.changes import changes, overview
from llama_fn.model import llama
from llama_fn.planner import config_stages
from llama_fn.tools.graph_diff import load
from sharding import Mesh, P, collectives_table

cfg = config.Config(
    model=config.ModelConfig(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, mlp_dim=128, vocab_size=256),
    data=config.DataConfig(seq_len=32, global_batch_size=4),
)
mesh = Mesh.parse("data:2,model:2")


def record(name: str) -> stages.Lowered:
    """Trace and lower the step as the model is now, and dump every stage."""
    traced = config_stages.train(cfg)
    writer = dump.DumpWriter(Path("work/notebook/dumps") / name)
    lowered = traced.lower(mesh, "fsdp_tp", observe=writer.observer(traced))
    writer.finish(lowered)
    return lowered


good = record("good")
print(collectives_table.as_text(good.collectives()))

# %% [markdown]
# Somebody annotates what the blocks pass on as whole in the sequence, "to be safe".

# %%
sharded = llama.RESIDUAL
llama.RESIDUAL = P("batch", "full_seq", "embed")
try:
    bad = record("bad")
finally:
    llama.RESIDUAL = sharded

# %% [markdown]
# Training still works and the loss is the same: only the dump shows it.

# %%
folders = [load(Path("work/notebook/dumps") / name)["."] for name in ("good", "bad")]
words = list(overview(changes(*folders)))
print("\n".join(words))

# %% [markdown]
# Every reduce-scatter of a layer became an all-reduce, twice the bytes. `--all`, or the changes themselves, name the
# lines that ask for them.

# %%
sums = [row for row in bad.collectives() if row.kind == "all_reduce" and row.axis == "model"]
of_layers = without_numbers(microbatch(0, layer(0)))
asked = {row.source for row in sums if row.scope.startswith(of_layers)}
print("asked for in", sorted(asked))
assert any("all_reduce over model" in str(change) for change in changes(*folders)) and all(
    "llama.py" in source for source in asked
)

# %% [markdown]
# Fixed: the graph is the one from before, which a test can hold on to.

# %%
fixed = record("fixed")
assert not changes(folders[0], load(Path("work/notebook/dumps/fixed"))["."])
