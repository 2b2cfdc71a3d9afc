"""transformers' side of benchmarks/decode.py.

Runs without the repository on its path: transformers probes for a package called `kernels`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import contender


def main() -> None:
    spec = contender.spec()
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if spec["name"] == "make":
        torch.manual_seed(0)
        shape = dict(num_hidden_layers=8, hidden_size=512, num_attention_heads=8, intermediate_size=1376)
        LlamaForCausalLM(LlamaConfig(vocab_size=32000, initializer_range=0.05, **shape)).save_pretrained(spec["theirs"])
        return
    contender.prepare(spec["threads"])
    kind = torch.bfloat16 if spec["dtype"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["theirs"], dtype=kind).eval()
    prompt = contender.batch(32000, spec["batch"], spec["prompt"] - 1, "cpu")
    more = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    if spec["name"] == "transformers_compiled":
        model.forward = torch.compile(model.forward, fullgraph=True)
        more["cache_implementation"] = "static"
    said: list[list[int]] = []

    @torch.no_grad()
    def run() -> None:
        said[:] = model.generate(prompt, max_new_tokens=spec["tokens"], **more)[:, spec["prompt"] :].tolist()

    run()
    contender.serve(run, "cpu", {"tokens": said})


if __name__ == "__main__":
    main()
