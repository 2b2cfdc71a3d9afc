"""Weights of Hugging Face or of Meta to a work folder of ours."""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from llama_fn import config_fields, tree
from llama_fn.checkpoint import huggingface, layout, tensors
from llama_fn.checkpoint.huggingface import Tensor
from llama_fn.checkpoint.integrity import SHARDS, sums_of_process, write_list
from llama_fn.checkpoint.layout import Stored
from llama_fn.checkpoint.meta_llama import MetaFolder
from llama_fn.checkpoint.orbax import Checkpoints
from llama_fn.checkpoint.weights import TOKENIZER_FILES
from llama_fn.config import Config, ModelConfig
from llama_fn.errors import UserError
from llama_fn.files import atomic
from llama_fn.model import llama
from sharding import Mesh


class HuggingFaceFolder:
    """Safetensors, one file or several with an index; files are opened one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cfg = huggingface.model_config(huggingface.read_config(folder), folder / "config.json")
        self.files = _files(folder)
        self.names = set(self.files) - _known_extras(self.cfg)
        self.opened: tuple[str, Any] = "", None

    def name(self, each: Tensor) -> str:
        """What Hugging Face calls it."""
        return each.name

    def where(self, each: Tensor) -> str:
        """The file in which it lies."""
        return self.files[each.name]

    def dtype(self) -> torch.dtype:
        """That of the embedding."""
        kind: torch.dtype = self.tensor(next(huggingface.tensors(self.cfg))).dtype
        return kind

    def tensor(self, each: Tensor) -> torch.Tensor:
        """One of them."""
        if self.opened[0] != (file := self.where(each)):
            self.opened = file, _opened(self.folder / file)
        held: torch.Tensor = self.opened[1].get_tensor(each.name)
        return held


Source = HuggingFaceFolder | MetaFolder


def convert(source: Path, out: Path, dtype: str | None) -> None:
    """Write `out`, a work folder with iteration 0; UserError where the model is not one of ours."""
    folder: Source = MetaFolder(source) if any(source.glob("consolidated.*.pth")) else HuggingFaceFolder(source)
    each = list(huggingface.tensors(folder.cfg))
    needed = [folder.name(one) for one in each]
    missing, extra = sorted(set(needed) - folder.names), sorted(folder.names - set(needed))
    if missing or extra:
        what = f"lacks {', '.join(missing[:5])}" if missing else f"has {', '.join(extra[:5])}, which have no place here"
        raise UserError(f"{source} {what} ({len(missing) + len(extra)} in all)")
    kept = huggingface.DTYPES[dtype] if dtype else folder.dtype()
    arrays = _arrays(folder.cfg, kept)
    values = config_fields.flat(replace(Config(), model=folder.cfg), "saved")
    model = {name: value for name, value in values.items() if name.startswith("model.")}
    meta = {"config": model, "from": str(source)}
    checkpoints = Checkpoints(out / "checkpoints", 1, 0)
    checkpoints.begin(0, arrays, meta, lambda target: _write(target, each, arrays, folder))
    checkpoints.commit(0)
    checkpoints.close()
    _beside(source, out, model)
    kind = str(kept).removeprefix("torch.")
    print(f"{len(each)} tensors in {kind} in {out / 'checkpoints' / '0'}; train on with --run.init_from={out}")


def _files(source: Path) -> dict[str, str]:
    """The file of each tensor: by the index, or of the one file."""
    index = source / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_bytes())["weight_map"])
    if not (source / "model.safetensors").exists():
        raise UserError(f"{source} has neither model.safetensors nor model.safetensors.index.json")
    with _opened(source / "model.safetensors") as held:
        return dict.fromkeys(held.keys(), "model.safetensors")


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def _known_extras(cfg: ModelConfig) -> set[str]:
    """What old files have beside the weights: rotary tables, and a head that is the embedding."""
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(cfg.num_layers)}
    return tables | ({"lm_head.weight"} if cfg.tie_embeddings else set())


def _arrays(cfg: ModelConfig, kept: torch.dtype) -> dict[str, Stored]:
    """Ours, in that dtype."""
    infos = tree.map(lambda info: replace(info, dtype=kept), llama.abstract_params(cfg))
    arrays = layout.stored({"params": infos}, None, Mesh(), 0)
    # A layer at a time is written.
    return {p: replace(a, chunk=(1, *a.chunk[1:])) if ".layers." in p else a for p, a in arrays.items()}


def _write(folder: Path, every: list[Tensor], arrays: dict[str, Stored], source: Source) -> None:
    """Every tensor into its place, file by file."""
    mine = tensors.process_folder(folder, 0)
    mine.mkdir()
    writer = tensors.Writer(folder, 0)
    by_file: dict[str, list[Tensor]] = defaultdict(list)
    for each in every:
        by_file[source.where(each)].append(each)
    in_turn = [each for held in by_file.values() for each in held]
    for each in track(in_turn, "converting", disable=not sys.stderr.isatty()):
        array, given = arrays[each.path], source.tensor(each)
        at = tuple(slice(0, n) for n in array.shape)
        shape = array.shape
        if each.layer is not None:
            at, shape = (slice(each.layer, each.layer + 1), *at[1:]), shape[1:]
        try:
            value = each.ours(given, shape).to(array.dtype)
        except RuntimeError:
            raise UserError(
                f"{source.folder / source.where(each)}: {source.name(each)} is {list(given.shape)}, which is not "
                f"{list(shape)}"
            ) from None
        writer.write(each.path, array, at, value if each.layer is None else value[None])
    write_list(folder.parent / SHARDS, sums_of_process(folder, mine))


def _beside(source: Path, out: Path, config: dict[str, Any]) -> None:
    """The tokenizer and the flags."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    with atomic(out / "config.json") as f:
        json.dump(config, f, indent=1)
    with atomic(out / "flags.txt") as f:
        f.write("".join(f"--{name}={value}\n" for name, value in config.items() if name != "model.preset"))
