"""Runs in a subprocess without the repository on its path: logits, loss and gradients of LlamaForCausalLM.

Its argument is a JSON list of [input, output, configuration]. An input is an .npz of weights and tokens in our names
and layouts, an output an .npz in the same names.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def answer(source: str, target: str, spec: dict) -> None:
    given = {name: torch.from_numpy(a) for name, a in np.load(source).items()}
    layers, d, n, h = given["layers.wq"].shape
    config = LlamaConfig(
        vocab_size=spec["vocab_size"], hidden_size=d, intermediate_size=spec["mlp_dim"], num_hidden_layers=layers,
        num_attention_heads=n, num_key_value_heads=spec["num_kv_heads"], rms_norm_eps=spec["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": spec["rope_theta"]}, attn_implementation="eager",
        tie_word_embeddings=spec["tie_embeddings"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    # ours -> (parameter of layer i, ours to theirs, theirs to ours)
    flat = lambda w: w.reshape(d, -1).t()  # noqa: E731
    split = lambda w: w.t().reshape(d, -1, h)  # noqa: E731
    table = {
        "attn_norm": ("input_layernorm", lambda w: w, lambda w: w),
        "wq": ("self_attn.q_proj", flat, split),
        "wk": ("self_attn.k_proj", flat, split),
        "wv": ("self_attn.v_proj", flat, split),
        "wo": ("self_attn.o_proj", lambda w: w.reshape(n * h, d).t(), lambda w: w.t().reshape(n, h, d)),
        "mlp_norm": ("post_attention_layernorm", lambda w: w, lambda w: w),
        "w_gate": ("mlp.gate_proj", lambda w: w.t(), lambda w: w.t()),
        "w_up": ("mlp.up_proj", lambda w: w.t(), lambda w: w.t()),
        "w_down": ("mlp.down_proj", lambda w: w.t(), lambda w: w.t()),
    }
    weights = dict(model.named_parameters())
    whole = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
    with torch.no_grad():
        for ours, theirs in whole.items():
            if ours in given:
                weights[theirs].copy_(given[ours])
        for ours, (theirs, to, _) in table.items():
            for i in range(layers):
                weights[f"model.layers.{i}.{theirs}.weight"].copy_(to(given[f"layers.{ours}"][i]))
    tokens, targets = given["tokens"], given["targets"]
    logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    out = {"logits": logits.detach(), "loss": loss.detach()}
    out |= {ours: weights[theirs].grad for ours, theirs in whole.items() if ours in given}
    for ours, (theirs, _, back) in table.items():
        grads = [back(weights[f"model.layers.{i}.{theirs}.weight"].grad) for i in range(layers)]
        out[f"layers.{ours}"] = torch.stack(grads)
    np.savez(target, **{name: value.numpy() for name, value in out.items()})


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        answer(*case)
