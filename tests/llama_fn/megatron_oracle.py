"""Runs in a subprocess: samples of megatron-core's GPTDataset from a .bin/.idx prefix, and what its reader sees."""

from __future__ import annotations

import json
import os
import sys
import types

import numpy as np


def main() -> None:
    prefix, folder, port = sys.argv[1:4]
    import torch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    from megatron.core.datasets import helpers
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert helpers
    raw = IndexedDataset(prefix)
    for spec in json.loads(sys.argv[4]):
        target = f"{folder}/{spec['count']}.npz"
        samples = samples_of(prefix, target, spec, BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig)
        index = {"lengths": raw.sequence_lengths, "first": raw[0], "documents": raw.document_indices}
        np.savez(target, samples=np.stack(samples), **index)


def samples_of(prefix, target, spec, builder, dataset, configuration):
    import torch

    tokenizer = types.SimpleNamespace(eod=0, pad=-1, vocab_size=1000, unique_identifiers={"name": "test"})
    config = configuration(
        random_seed=spec["seed"], sequence_length=spec["seq_len"], blend=([prefix], None), split=spec["split"],
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
