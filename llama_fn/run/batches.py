"""Batches of a run: the iterator over its samples, the batches of a validation, and their way onto the device."""

from __future__ import annotations

from collections.abc import Mapping

from llama_fn import tree
from llama_fn.compiler import stages
from llama_fn.config import Config
from llama_fn.data.blend import Blend
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.rampup import Rampup
from llama_fn.data.samples import Samples
from llama_fn.data.skips import Ranges
from llama_fn.distributed import Processes
from llama_fn.model import train_step
from sharding import P


def iterator(
    cfg: Config, samples: Samples | Blend, to_device: ToDevice, consumed: int = 0, tokens: int = 0,
    skipped: Ranges = (), rampup: Rampup | None = None,
) -> BatchIterator:  # fmt: skip
    """Batches of `samples` for this run, from `consumed` samples on."""
    d = cfg.data
    shape = (d.global_batch_size, d.microbatches, cfg.model.vocab_size)
    return BatchIterator(samples, *shape, consumed, tokens, to_device.rows, skipped, d.segments, d.mask_ends, rampup)


def validation_batches(
    cfg: Config, sources: Mapping[str, Samples], to_device: ToDevice
) -> dict[str, list[train_step.Batch]]:
    """The batches of every validation, by source, on the device."""
    held = {}
    for name, samples in sources.items():
        batches = iterator(cfg, samples, to_device)
        held[name] = [to_device(next(batches)) for _ in range(cfg.run.eval_batches)]
        batches.close()
    return held


class ToDevice:
    """Brings this process's rows of a global batch onto its device, cut where further dimensions are sharded."""

    def __init__(self, cfg: Config, step: stages.Compiled, processes: Processes | None) -> None:
        self.device, self.processes, self.rows = cfg.run.device, processes, slice(None)
        leaves, layouts = tree.leaves(train_step.abstract_batch(cfg)), step.lowered.layouts_of("batch")
        if processes is not None:
            (at, _), *_ = processes.parts(leaves, layouts)[0].pieces
            self.rows = at[1]
        self.layouts = [P.of(axes if dim != 1 else () for dim, axes in enumerate(p.by_dim)) for p in layouts]

    def __call__(self, batch: train_step.Batch) -> train_step.Batch:
        """This process's part of a global batch, on its device."""
        if self.processes is not None:
            batch = self.processes.local(batch, self.layouts)
        return tree.map(lambda x: x.to(self.device, non_blocking=True), batch)
