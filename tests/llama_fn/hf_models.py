"""Random models of transformers, and what it computes of folders: run apart from the project, whose `kernels` package
transformers would take for another.

    python hf_models.py make FOLDER           FOLDER/NAME of every model, with its answers
    python hf_models.py read FOLDER OUT.npz   the answers of a folder
    python hf_models.py loss FOLDER IDS.npy   prints the mean loss of windows of 32 tokens, one after the other
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL = dict(
    num_hidden_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=96,
    vocab_size=400,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
    max_position_embeddings=64,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def shaken(model):
    """Biases that are not 0 and norms that are not 1."""
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() == 1:
                x.add_(0.3 * torch.randn_like(x))
    return model


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, **SMALL)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, rope_parameters=LLAMA3, **SMALL)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, tie_word_embeddings=True, **SMALL)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(num_key_value_heads=2, head_dim=32, sliding_window=None, **SMALL)
    ),
    "qwen2": lambda: shaken(Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **SMALL))),
    "qwen3": lambda: shaken(Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=32, **SMALL))),
}
TOKENS = torch.arange(2 * 24).reshape(2, 24) * 7 % 256


def loaded(folder):
    """In float32: a model that is cast has its rotary frequencies cast too, so it is loaded anew."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def answers(folder):
    model = loaded(folder)
    prompt = TOKENS[:, :9]  # all of it: a mask is made of tokens that pad otherwise
    named = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(prompt, max_new_tokens=20, do_sample=False, **named)
    return {"logits": model(TOKENS).logits.numpy(), "greedy": said[:, 9:].numpy()}


@torch.no_grad()
def loss(folder, ids):
    model, total = loaded(folder), 0.0
    for start in range(0, len(ids) - 1, 32):
        window = torch.from_numpy(ids[start : start + 33].astype(np.int64))[None]
        logits = model(window[:, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return total / (len(ids) - 1)


if sys.argv[1] == "make":
    for i, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(i)
        model, folder = make().bfloat16(), Path(sys.argv[2]) / name
        model.save_pretrained(folder, max_shard_size="60KB" if name == "llama3" else "5GB")
        np.savez(folder / "answers.npz", **answers(folder))
elif sys.argv[1] == "read":
    np.savez(sys.argv[3], **answers(sys.argv[2]))
else:
    print("LOSS", loss(sys.argv[2], np.load(sys.argv[3])))
