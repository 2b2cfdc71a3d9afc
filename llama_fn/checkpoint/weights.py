"""The parameters of a checkpoint alone: of a run's work folder, of one of its iterations, or of converted weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from llama_fn import tree
from llama_fn.checkpoint.integrity import Damaged, check, read_meta
from llama_fn.checkpoint.tensors import Reader
from llama_fn.config import ModelConfig
from llama_fn.errors import UserError
from sharding.parts import Part

# Beside weights; the first that there is says how text becomes tokens.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


class Weights:
    """Those in `folder`, which is checked as `flag` names it. `cfg`: the model that they are of; `step`: the iteration
    that saved them, 0 of converted ones; `tokenizer`: of the work folder, None where it has none.

    UserError where there is no checkpoint, or one that is damaged: another than the newest is not taken unasked.
    """

    def __init__(self, folder: Path, flag: str) -> None:
        self.folder = _newest(folder, flag)
        try:
            check(self.folder)
            meta = read_meta(self.folder)
        except Damaged as damage:
            raise UserError(f"{flag}={folder}: {self.folder} is damaged ({damage}). Name another iteration") from None
        self.flag, self.given, self.step, self.meta = flag, folder, int(self.folder.name), meta
        self.cfg = _model(meta["config"])
        self.reader = Reader(self.folder / "state")
        beside = (self.folder.parent.parent / name for name in TOKENIZER_FILES)
        self.tokenizer = next((path for path in beside if path.exists()), None)

    def refuse_others(self, infos: Any) -> None:
        """UserError listing the parameters whose shape is not that of `infos`; dtypes may differ."""
        saved = {p: text.partition("[")[2] for p, text in self.meta["arrays"].items() if p.startswith("params.")}
        wanted = {f"params.{p}": ",".join(map(str, info.shape)) + "]" for p, info in tree.by_path(infos).items()}
        lines = [
            f"  {path}: there [{saved.get(path, 'nothing]')}, needed [{wanted.get(path, 'nothing]')}"
            for path in sorted({*wanted, *saved})
            if saved.get(path) != wanted.get(path)
        ]
        if lines:
            raise UserError(f"{self.flag}={self.given} holds another model:\n" + "\n".join(lines))

    def load(self, infos: Any, parts: Mapping[str, Part], device: str) -> Any:
        """The parts of the parameters, in the dtypes of `infos`."""
        self.refuse_others(infos)

        def leaf(path: str, info: Any) -> torch.Tensor:
            return self.reader.part(f"params.{path}", parts[path], device).to(info.dtype)

        return tree.map_with_path(leaf, infos)


def _newest(folder: Path, flag: str) -> Path:
    """The folder of an iteration."""
    if (folder / "state").is_dir() and folder.name.isdigit():
        return folder
    steps = [p for p in (folder / "checkpoints").glob("*") if p.name.isascii() and p.name.isdigit() and p.is_dir()]
    if not steps:
        raise UserError(
            f"{flag}={folder} has no checkpoints: name a work folder, one of its checkpoints/N, or what "
            "python -m llama_fn.tools.convert wrote"
        )
    return max(steps, key=lambda path: int(path.name))


def _model(config: Mapping[str, Any]) -> ModelConfig:
    """Of the flags that a checkpoint keeps."""
    known = {f.name for f in fields(ModelConfig)}
    named = {name.removeprefix("model."): value for name, value in config.items() if name.startswith("model.")}
    return ModelConfig(**{name: value for name, value in named.items() if name in known})
