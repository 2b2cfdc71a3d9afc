"""A model of random bf16 weights, in shards as Hugging Face writes them, to ours and back: seconds, memory, every bit.

    python benchmarks/convert.py --preset llama_7b [--folder DIR]

Memory is the most that the converting process held at a time (ru_maxrss: pages of the files that it reads included).
The folder needs three times the weights' bytes; 7B takes 41 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llama_fn.config import ModelConfig
from llama_fn.model.presets import PRESETS as MODELS
from llama_fn.model.presets import preset

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama_7b", choices=MODELS)
    parser.add_argument("--folder", help="where to work; a temporary folder unless given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write(folder / "hf", preset(args.preset))
        print(f"{args.preset}: {size / 1e9:.1f} GB in bf16", flush=True)
        converted("to ours", size, f"--source={folder / 'hf'}", f"--out={folder / 'ours'}")
        converted("and back", size, f"--source={folder / 'ours'}", f"--out={folder / 'back'}", "--to=huggingface")
        print("every bit came back" if hashes(folder / "hf") == hashes(folder / "back") else "THE TENSORS DIFFER")


def write(folder: Path, model: ModelConfig) -> int:
    """A file per layer, and one for the rest; returns their bytes."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "hidden_size": model.embed_dim, "intermediate_size": model.mlp_dim, "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads, "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names = [list(layer(model, n)) for n in range(model.num_layers)] + [list(rest(model))]
    files = [f"model-{n + 1:05}-of-{len(names):05}.safetensors" for n in range(len(names))]
    for n, file in enumerate(files):
        shapes = layer(model, n) if n < model.num_layers else rest(model)
        save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, folder / file)
    index = {name: file for file, held in zip(files, names, strict=True) for name in held}
    size = sum((folder / file).stat().st_size for file in files)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    return size


def layer(model: ModelConfig, n: int) -> dict[str, tuple[int, ...]]:
    """Shapes by Hugging Face's names."""
    d, f, kv = model.embed_dim, model.mlp_dim, model.num_kv_heads * (model.embed_dim // model.num_heads)
    return {
        f"model.layers.{n}.{name}.weight": shape
        for name, shape in {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
            "input_layernorm": (d,), "post_attention_layernorm": (d,),
        }.items()
    }  # fmt: skip


def rest(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What stands outside of layers."""
    table = (model.vocab_size, model.embed_dim)
    return {"model.embed_tokens.weight": table, "model.norm.weight": table[1:], "lm_head.weight": table}


def converted(what: str, size: int, *flags: str) -> None:
    """Run the command, and print what it took."""
    began = time.perf_counter()
    command = subprocess.Popen([sys.executable, "-m", "llama_fn.tools.convert", *flags], cwd=ROOT)
    _, status, used = os.wait4(command.pid, 0)
    took = time.perf_counter() - began
    if status:
        sys.exit(f"{what}: the command failed")
    print(f"{what}: {took:.0f} s, {size / took / 1e9:.2f} GB/s, {used.ru_maxrss / 2**20:.2f} GiB", flush=True)


def hashes(folder: Path) -> dict[str, str]:
    """Of every tensor."""

    def each() -> Iterator[tuple[str, str]]:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                for name in sorted(f.keys()):
                    data = f.get_tensor(name).view(torch.int16).numpy()
                    yield name, hashlib.blake2b(data).hexdigest()

    return dict(each())


if __name__ == "__main__":
    main()
