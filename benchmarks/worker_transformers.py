"""The rivals of benchmarks/step.py: LlamaForCausalLM, global-norm clipping and torch's fused AdamW.

Runs without the repository on its path: transformers probes for a package called `kernels`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import contender

SHAPES = {  # layers, dim, heads, mlp, vocab
    "llama_tiny": (4, 256, 4, 688, 4096),
    "llama_60m": (8, 512, 8, 1376, 32000),
    "llama_1b": (22, 2048, 16, 5504, 32000),
}


def main() -> None:
    spec = contender.spec()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    contender.prepare(spec["threads"])
    torch.manual_seed(0)
    layers, dim, heads, mlp, vocab = SHAPES[spec["preset"]]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=4096, rms_norm_eps=1e-6, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(spec["device"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if spec["compiled"] else model
    tokens = contender.batch(vocab, spec["batch"], spec["seq"], spec["device"])[:, :-1].contiguous()
    cast = torch.autocast(spec["device"], torch.bfloat16, enabled=spec["dtype"] == "bf16")

    def run() -> None:
        with cast:
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    contender.serve(run, spec["device"], {})


if __name__ == "__main__":
    main()
