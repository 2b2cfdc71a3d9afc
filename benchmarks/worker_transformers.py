"""transformers' sides of benchmarks/step.py: LlamaForCausalLM, global-norm clipping and torch's fused AdamW; also what
makes the weights of all contenders.

Runs without the repository on its path: transformers probes for a package called `kernels`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import contender


def make(spec: dict) -> None:
    """Random weights in Hugging Face's files, which everybody reads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=spec["vocab"], hidden_size=spec["dim"], intermediate_size=spec["mlp"],
        num_hidden_layers=spec["layers"], num_attention_heads=spec["heads"], num_key_value_heads=spec["kv_heads"],
        max_position_embeddings=max(4096, spec["seq"]), rms_norm_eps=1e-6, use_cache=False,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(spec["theirs"], max_shard_size="100GB")


def main() -> None:
    spec = contender.spec()
    if spec["name"] == "make":
        make(spec)
        return
    import torch
    from transformers import LlamaForCausalLM

    contender.prepare(spec["threads"])
    model = LlamaForCausalLM.from_pretrained(spec["theirs"], dtype=torch.float32, attn_implementation="sdpa")
    model = model.to(spec["device"]).train()
    optimizer = contender.torch_adamw(model.parameters(), fused=True)
    forward = torch.compile(model) if spec["name"] == "transformers_compiled" else model
    tokens, targets = contender.tokens_and_targets(spec)
    cast = torch.autocast(spec["device"], torch.bfloat16, enabled=spec["dtype"] == "bf16")

    def run() -> float:
        with cast:
            loss = forward(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), contender.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    contender.serve(run, spec["device"], {})


if __name__ == "__main__":
    main()
