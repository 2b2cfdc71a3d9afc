"""A model of a work folder with its tokenizer, for the tools that use one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch

from llama_fn import compat
from llama_fn.checkpoint import layout
from llama_fn.checkpoint.weights import Weights
from llama_fn.compiler.backends import code_cache
from llama_fn.config import ModelConfig
from llama_fn.data import tokenizer
from llama_fn.errors import UserError
from llama_fn.model import llama
from sharding import Mesh


@dataclass(frozen=True)
class Loaded:
    """Parameters in float32, and what they are of."""

    weights: Weights
    cfg: ModelConfig
    params: llama.Params
    pieces: spm.SentencePieceProcessor
    tokenizer: Path


def load(source: Path, tokenizer_path: str, dtype: Any) -> Loaded:
    """The newest checkpoint of `source`; UserError where there is none, and where no tokenizer is known."""
    logging.getLogger("llama_fn").setLevel(logging.WARNING)
    torch.set_num_threads(compat.physical_cores())
    weights = Weights(source, "--source")
    cfg = replace(weights.cfg, compute_dtype=dtype)
    path = Path(tokenizer_path) if tokenizer_path else _tokenizer(weights)
    pieces = tokenizer.load(path)
    tokenizer.check_vocabulary(pieces, cfg.vocab_size, path)
    infos = llama.abstract_params(cfg)
    params = weights.load(infos, layout.parts(infos, None, Mesh(), 0), "cpu")
    return Loaded(weights, cfg, params, pieces, path)


def backend_options(backend: str) -> dict[str, Any]:
    """What compiling a step takes on this machine."""
    return {} if backend == "eager" else {"cache": code_cache.usable(code_cache.default())}


def _tokenizer(weights: Weights) -> Path:
    """Beside the weights, where their run found one, or what their run trained."""
    named, workdir = weights.meta["config"].get("data.tokenizer"), weights.folder.parent.parent
    known = [*filter(None, [weights.tokenizer, Path(named) if named else None])]
    trained = sorted((workdir / "data").glob("tokenizer_*.model"), key=lambda path: path.stat().st_mtime)
    there = [path for path in [*known, *trained[-1:]] if path.exists()]
    if not there:
        raise UserError(f"{workdir} has no tokenizer: name one with --tokenizer")
    return there[0]
