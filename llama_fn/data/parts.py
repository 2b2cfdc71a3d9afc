"""The data of a run: datasets that are verified and taken apart into training and validation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama_fn.config import Config
from llama_fn.data import indexed, rampup, use
from llama_fn.data.blend import Blend, requested
from llama_fn.data.mixture import Source, sources
from llama_fn.data.prepare import prefixes
from llama_fn.data.samples import Samples, split_ranges
from llama_fn.data.skips import ranges

log = logging.getLogger("llama_fn.data")
VERIFIED = "verified.json"


@dataclass(frozen=True)
class Part:
    """A source's dataset, and which of its sequences are for training and for validation; `valid` is None without
    any."""

    source: Source
    data: indexed.IndexedDataset
    train: tuple[int, int]
    valid: tuple[int, int] | None


@dataclass(frozen=True)
class Parts:
    """The data of a run: one source, or the sources of a mixture."""

    parts: tuple[Part, ...]

    @property
    def data(self) -> indexed.IndexedDataset:
        """That of the first source."""
        return self.parts[0].data

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to validate on."""
        return any(part.valid is not None for part in self.parts)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data."""
        if len(self.parts) == 1:
            return self.data.fingerprint
        each = ({"name": p.source.name, "weight": p.source.weight, **p.data.fingerprint} for p in self.parts)
        return {"sources": list(each)}

    def train_samples(
        self, cfg: Config, consumed: int, left: int, known: Mapping[str, Any] = MappingProxyType({})
    ) -> Samples | Blend:
        """The samples of a run that has consumed some and has `left` iterations to go. `known`: the iterator's state
        in a checkpoint."""
        count = rampup.of(cfg.data).reached(consumed, left, ranges(cfg.data.skip))
        if len(self.parts) == 1:
            (part,) = self.parts
            samples = Samples(part.data, part.train, cfg.data.seq_len, count, cfg.run.seed, "train", _cache(cfg))
            use.refuse_too_often(part.source, samples.count / samples.per_epoch)
            log.info(
                "data: %s, %d documents, %d tokens; train %d samples over %d epochs",
                part.data.bin_path, len(part.data), len(part.data.tokens), samples.count, samples.epochs,
            )  # fmt: skip
            return samples
        weights = [part.source.weight for part in self.parts]
        length, seed, cache = cfg.data.seq_len, cfg.run.seed, _cache(cfg)
        each = [
            Samples(p.data, p.train, length, size, seed, f"{p.source.name} train", cache)
            for p, size in zip(self.parts, requested(weights, count), strict=True)
        ]
        log.info("%s", use.table([part.source for part in self.parts], each, count))
        return Blend(each, weights, count, known.get("blend"))

    def valid_samples(self, cfg: Config) -> dict[str, Samples]:
        """The samples of one validation, by the name of the source, "" for one alone."""
        count = cfg.run.eval_batches * cfg.data.global_batch_size
        shape = (cfg.data.seq_len, count, cfg.run.seed)
        return {
            p.source.name: Samples(p.data, p.valid, *shape, f"{p.source.name} validation".strip())
            for p in self.parts
            if p.valid is not None
        }


def _cache(cfg: Config) -> Path:
    """Where orders of samples are kept."""
    return Path(cfg.data.cache or Path(cfg.run.workdir) / "data")


def open_parts(cfg: Config, workdir: Path) -> Parts:
    """The data that cfg names, tokenized if it is text, verified, and taken apart."""
    datasets = [indexed.IndexedDataset(prefix) for prefix in prefixes(cfg, workdir)]
    for data in datasets if cfg.data.verify else ():
        data.verify(cfg.model.vocab_size, workdir / "data" / VERIFIED)
    listed = sources(cfg.data.path)
    return Parts(tuple(_part(cfg, source, data) for source, data in zip(listed, datasets, strict=True)))


def _part(cfg: Config, source: Source, data: indexed.IndexedDataset) -> Part:
    train, valid, _ = split_ranges(cfg.data.split, len(data))
    # What is held out stays out of the training, whether or not it is looked at.
    if not cfg.run.eval_every or not source.valid:
        return Part(source, data, train, None)
    if valid[0] == valid[1]:
        where = f" of {source.name}" if source.name else ""
        log.warning(
            "--data.split=%s gives no validation document of %d%s: no validation", cfg.data.split, len(data), where
        )
        return Part(source, data, train, None)
    return Part(source, data, train, valid)
