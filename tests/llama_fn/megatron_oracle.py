"""Runs in a subprocess: samples of megatron-core's GPTDataset from a .bin/.idx prefix, and what its reader sees."""

from __future__ import annotations

import json
import os
import sys
import types

import numpy as np


def main() -> None:
    prefix, folder, specs_text = sys.argv[1:4]
    import torch

    meeting = f"file://{folder}/meeting.{os.getpid()}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    from megatron.core.datasets import helpers
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if prefix == "orders":
        orders(json.loads(specs_text), folder, helpers)
        return
    specs = json.loads(specs_text)
    if "blend" in specs[0]:
        for spec in specs:
            target = f"{folder}/blend_{spec['count']}.npz"
            blend = (spec["blend"], spec["weights"])
            np.savez(target, samples=np.stack(samples_of(
                blend, target, spec, BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig
            )))  # fmt: skip
        return
    raw = IndexedDataset(prefix)
    for spec in specs:
        target = f"{folder}/{spec['count']}.npz"
        samples = samples_of(
            ([prefix], None), target, spec, BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig
        )
        index = {"lengths": raw.sequence_lengths, "first": raw[0], "documents": raw.document_indices}
        np.savez(target, samples=np.stack(samples), **index)


def orders(cases, folder, helpers):
    """build_blending_indices for each case of weights and size."""
    found = {}
    for number, (weights, size) in enumerate(cases):
        weights = np.array(weights, dtype=np.float64)
        weights = weights / weights.sum()
        weights = weights / weights.sum()
        sources, indices = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        helpers.build_blending_indices(sources, indices, weights, len(weights), size, False)
        found |= {f"sources_{number}": sources, f"indices_{number}": indices}
    np.savez(f"{folder}/orders.npz", **found)


def samples_of(blend, target, spec, builder, dataset, configuration):
    import torch

    tokenizer = types.SimpleNamespace(eod=0, pad=-1, vocab_size=1000, unique_identifiers={"name": "test"})
    config = configuration(
        random_seed=spec["seed"], sequence_length=spec["seq_len"], blend=blend, split=spec["split"],
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        path_to_cache=target + ".cache",
    )  # fmt: skip
    train, _, _ = builder(dataset, [spec["count"], 1, 0], lambda: True, config).build()
    rows = []
    for k in range(spec["count"]):
        sample = train[k]
        rows.append(torch.cat([sample["tokens"], sample["labels"][-1:]]).numpy())
    return rows


if __name__ == "__main__":
    main()
