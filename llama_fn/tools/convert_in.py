"""Hugging Face's safetensors to a work folder of ours."""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track

from llama_fn import config_fields, tree
from llama_fn.checkpoint import huggingface, layout, tensors
from llama_fn.checkpoint.huggingface import Tensor
from llama_fn.checkpoint.integrity import SHARDS, sums_of_process, write_list
from llama_fn.checkpoint.layout import Stored
from llama_fn.checkpoint.orbax import Checkpoints
from llama_fn.config import Config
from llama_fn.errors import UserError
from llama_fn.files import atomic
from llama_fn.model import llama
from sharding import Mesh


def convert(source: Path, out: Path, dtype: str | None) -> None:
    """Write `out`, a work folder with iteration 0; UserError where the model is not one of ours."""
    config = huggingface.read_config(source)
    cfg = huggingface.model_config(config, source / "config.json")
    files = _files(source)
    names = list(huggingface.tensors(cfg))
    missing = [each.name for each in names if each.name not in files]
    extra = sorted(set(files) - {each.name for each in names} - _known_extras(names))
    if missing or extra:
        what = f"lacks {', '.join(missing[:5])}" if missing else f"has {', '.join(extra[:5])}, which have no place here"
        raise UserError(f"{source} {what} ({len(missing) + len(extra)} in all)")
    arrays, kept = _arrays(cfg, names, source, files, dtype)
    values = config_fields.flat(replace(Config(), model=cfg), "saved")
    model = {name: value for name, value in values.items() if name.startswith("model.")}
    meta = {"config": model, "from": str(source)}
    checkpoints = Checkpoints(out / "checkpoints", 1, 0)
    checkpoints.begin(0, arrays, meta, lambda folder: _write(folder, names, arrays, source, files))
    checkpoints.commit(0)
    checkpoints.close()
    _beside(source, out, model)
    print(f"{len(names)} tensors in {kept} in {out / 'checkpoints' / '0'}; train on with --run.init_from={out}")


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


def _known_extras(names: list[Tensor]) -> set[str]:
    """What old files have beside the weights: rotary tables, and a head that is the embedding."""
    layers = {each.name.rsplit(".self_attn.", 1)[0] for each in names if ".self_attn." in each.name}
    return {f"{layer}.self_attn.rotary_emb.inv_freq" for layer in layers} | {"lm_head.weight"}


def _arrays(
    cfg: Any, names: list[Tensor], source: Path, files: dict[str, str], dtype: str | None
) -> tuple[dict[str, Stored], str]:
    """Ours, in the dtype that is asked for or the one of the first tensor."""
    kept = huggingface.DTYPES[dtype] if dtype else None
    if kept is None:
        with _opened(source / files[names[0].name]) as held:
            kept = held.get_tensor(names[0].name).dtype
    infos = tree.map(lambda info: replace(info, dtype=kept), llama.abstract_params(cfg))
    arrays = layout.stored({"params": infos}, None, Mesh(), 0)
    # A layer at a time is written.
    arrays = {p: replace(a, chunk=(1, *a.chunk[1:])) if ".layers." in p else a for p, a in arrays.items()}
    return arrays, str(kept).removeprefix("torch.")


def _write(folder: Path, names: list[Tensor], arrays: dict[str, Stored], source: Path, files: dict[str, str]) -> None:
    """Every tensor into its place; files are opened one after the other."""
    mine = tensors.process_folder(folder, 0)
    mine.mkdir()
    writer = tensors.Writer(folder, 0)
    by_file: dict[str, list[Tensor]] = defaultdict(list)
    for each in names:
        by_file[files[each.name]].append(each)
    every = [(file, each) for file, held in by_file.items() for each in held]
    opened: dict[str, Any] = {}
    for file, each in track(every, "converting", disable=not sys.stderr.isatty()):
        if file not in opened:
            opened = {file: _opened(source / file)}
        array, given = arrays[each.path], opened[file].get_tensor(each.name)
        at = tuple(slice(0, n) for n in array.shape)
        shape = array.shape
        if each.layer is not None:
            at, shape = (slice(each.layer, each.layer + 1), *at[1:]), shape[1:]
        try:
            value = each.ours(given, shape).to(array.dtype)
        except RuntimeError:
            raise UserError(
                f"{source / file}: {each.name} is {list(given.shape)}, which is not {list(shape)}"
            ) from None
        writer.write(each.path, array, at, value if each.layer is None else value[None])
    write_list(folder.parent / SHARDS, sums_of_process(folder, mine))


def _beside(source: Path, out: Path, config: dict[str, Any]) -> None:
    """The tokenizer and the flags."""
    if (source / "tokenizer.model").exists():
        shutil.copyfile(source / "tokenizer.model", out / "tokenizer.model")
    with atomic(out / "config.json") as f:
        json.dump(config, f, indent=1)
    with atomic(out / "flags.txt") as f:
        f.write("".join(f"--{name}={value}\n" for name, value in config.items() if name != "model.preset"))
