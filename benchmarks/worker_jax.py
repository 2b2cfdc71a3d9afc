"""JAX's side of benchmarks/step.py: the same model and optimizer as one jitted function with donated arguments."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import contender
import jax
import jax.numpy as jnp
import numpy as np


def load(folder: str) -> dict:
    """embed, head, norm, and layers: a list of Hugging Face's tensors by the name of each."""
    from safetensors.numpy import load_file

    files = {name.removesuffix(".weight"): x for name, x in load_file(Path(folder) / "model.safetensors").items()}
    layers: list[dict] = []
    while (prefix := f"model.layers.{len(layers)}.") + "input_layernorm" in files:
        layers.append({name.removeprefix(prefix): x for name, x in files.items() if name.startswith(prefix)})
    embed, head, norm = (files[name] for name in ("model.embed_tokens", "lm_head", "model.norm"))
    return jax.tree.map(jnp.asarray, {"embed": embed, "head": head, "norm": norm, "layers": layers})


def norm(x, weight):
    wide = x.astype(jnp.float32)
    return weight * (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def turned(x, cos, sin):
    one, two = jnp.split(x, 2, -1)
    return x * cos.astype(x.dtype) + jnp.concatenate((-two, one), -1) * sin.astype(x.dtype)


def loss_of(params, tokens, targets, table, n, k):
    cos, sin = (x[:, None, :] for x in table)
    x = params["embed"][tokens]
    b, t, d = x.shape
    for layer in params["layers"]:
        h = norm(x, layer["input_layernorm"])
        q, key, v = (
            (h @ layer[f"self_attn.{name}_proj"].T).reshape(b, t, heads, d // n)
            for name, heads in (("q", n), ("k", k), ("v", k))
        )
        o = jax.nn.dot_product_attention(turned(q, cos, sin), turned(key, cos, sin), v, is_causal=True)
        x = x + o.reshape(b, t, d) @ layer["self_attn.o_proj"].T
        h = norm(x, layer["post_attention_layernorm"])
        gate, up = h @ layer["mlp.gate_proj"].T, h @ layer["mlp.up_proj"].T
        x = x + (jax.nn.silu(gate) * up) @ layer["mlp.down_proj"].T
    logits = (norm(x, params["norm"]) @ params["head"].T).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).mean()


def main() -> None:
    spec = contender.spec()
    params = load(spec["theirs"])
    tokens, targets = (jnp.asarray(x.numpy()) for x in contender.tokens_and_targets({**spec, "device": "cpu"}))
    head_dim = spec["dim"] // spec["heads"]
    rates = 10000.0 ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = np.tile(np.outer(np.arange(spec["seq"], dtype=np.float32), rates), 2)
    table = jnp.cos(angles), jnp.sin(angles)
    dtype = jnp.bfloat16 if spec["dtype"] == "bf16" else jnp.float32
    (b1, b2), zeros = contender.BETAS, jax.tree.map(jnp.zeros_like, params)

    def step(state):
        params, first, second, count = state
        cast = jax.tree.map(lambda p: p.astype(dtype), params)
        loss, grads = jax.value_and_grad(loss_of)(cast, tokens, targets, table, spec["heads"], spec["kv_heads"])
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        size = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, contender.CLIP / (size + 1e-6)), grads)
        count = count + 1
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, grads)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, second, grads)

        def new(p, m, v):
            update = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + contender.EPS)
            return p - contender.LR * (update + (contender.DECAY if p.ndim > 1 else 0.0) * p)

        return (jax.tree.map(new, params, first, second), first, second, count), loss

    jitted = jax.jit(step, donate_argnums=0)
    held = [(params, zeros, jax.tree.map(jnp.copy, zeros), jnp.float32(0))]

    def run() -> float:
        held[0], loss = jitted(held[0])
        return float(loss)

    contender.serve(run, spec["device"], {})


if __name__ == "__main__":
    main()
