"""A work folder of ours to what transformers, vLLM and lm_eval load: safetensors in shards, config.json, tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from rich.progress import track

from llama_fn.checkpoint import huggingface
from llama_fn.checkpoint.weights import TOKENIZER_FILES, Weights
from llama_fn.data import tokenizer
from llama_fn.files import atomic

SHARD_BYTES = 800_000_000  # held in memory once, and once more while it is written
LENGTH = 2048  # of the sequences, where a checkpoint does not say


def convert(source: Path, out: Path, dtype: str) -> None:
    """Write `out`; the index last, without which no reader takes the folder for a whole model."""
    weights = Weights(source, "--source")
    cfg, kind = weights.cfg, huggingface.DTYPES[dtype]
    out.mkdir(parents=True, exist_ok=True)
    shards = _Shards(out)
    for each in track(list(huggingface.tensors(cfg)), "converting", disable=not sys.stderr.isatty()):
        array = weights.reader.array(each.path)
        at = tuple(slice(0, n) for n in array.shape)
        if each.layer is None:
            value = weights.reader.tensor(each.path, at)
        else:
            value = weights.reader.tensor(each.path, (slice(each.layer, each.layer + 1), *at[1:]))[0]
        shards.add(each.name, each.theirs(value).to(kind))
    tokens = _tokenizer(weights, out)
    length = int(weights.meta["config"].get("data.seq_len", LENGTH))
    _json(out / "config.json", huggingface.hf_config(cfg, dtype, length, tokens))
    shards.finish()
    print(f"iteration {weights.step} of {weights.given}: {len(shards.files)} tensors in {dtype} in {out}")


class _Shards:
    """Files of at most SHARD_BYTES, named when their number is known."""

    def __init__(self, out: Path) -> None:
        self.out, self.files, self.held = out, dict[str, int](), dict[str, torch.Tensor]()
        self.count, self.bytes, self.total = 0, 0, 0

    def add(self, name: str, value: torch.Tensor) -> None:
        if self.held and self.bytes + value.nbytes > SHARD_BYTES:
            self._write()
        self.held[name] = value.contiguous()
        self.bytes += value.nbytes
        self.total += value.nbytes

    def _write(self) -> None:
        from safetensors.torch import save_file

        self.count += 1
        save_file(self.held, self.out / f".{self.count}.safetensors", metadata={"format": "pt"})
        self.files |= dict.fromkeys(self.held, self.count)
        self.held, self.bytes = {}, 0

    def finish(self) -> None:
        """Name the files, and write the index."""
        self._write()
        names = {i: f"model-{i:05}-of-{self.count:05}.safetensors" for i in range(1, self.count + 1)}
        if self.count == 1:
            names = {1: "model.safetensors"}
        for i, name in names.items():
            (self.out / f".{i}.safetensors").rename(self.out / name)
        if self.count > 1:
            index = {tensor: names[i] for tensor, i in self.files.items()}
            content = {"metadata": {"total_size": self.total}, "weight_map": index}
            _json(self.out / "model.safetensors.index.json", content)


def _tokenizer(weights: Weights, out: Path) -> dict[str, int]:
    """Copy the tokenizer, if there is one; returns its special tokens for config.json."""
    path = weights.tokenizer
    if path is None and weights.meta["config"].get("data.tokenizer"):
        path = Path(weights.meta["config"]["data.tokenizer"])
    if path is None or not path.exists():
        print(f"no tokenizer.model beside {weights.given}: put one into {out}", file=sys.stderr)
        return {}
    loaded = tokenizer.load(path)
    if isinstance(loaded, spm.SentencePieceProcessor):
        shutil.copyfile(path, out / "tokenizer.model")
        _json(out / "tokenizer_config.json", _config(loaded))
    else:  # as they came, whatever they are called here
        for name in {path.name, *TOKENIZER_FILES}:
            if path.with_name(name).exists():
                shutil.copyfile(path.with_name(name), out / name)
    ids = {"bos_token_id": loaded.bos_id(), "eos_token_id": loaded.eos_id()}
    return {name: number for name, number in ids.items() if number >= 0}


def _config(loaded: spm.SentencePieceProcessor) -> dict[str, Any]:
    """tokenizer_config.json of a sentencepiece model."""
    special = {name: loaded.id_to_piece(number()) for name, number in (
        ("bos_token", loaded.bos_id), ("eos_token", loaded.eos_id), ("unk_token", loaded.unk_id),
    ) if number() >= 0}  # fmt: skip
    return {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "clean_up_tokenization_spaces": False, **special,
    }  # fmt: skip


def _json(path: Path, content: Any) -> None:
    with atomic(path) as f:
        json.dump(content, f, indent=2)
