"""How many tokens a second the data give, beside megatron-core's loader, on one thread from the page cache.

    python benchmarks/loader.py [--seq_len=2048] [--batches=200]

A mixture of two sources, 0.7 and 0.3, of documents of 100 to 4,000 tokens. Ours makes batches of 16 rows; Megatron's
BlendedDataset gives one sample after the other, which is its way too. Both read the same files and the same samples.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig
from llama_fn.data import writer
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import open_parts

MEGATRON = """
import sys, time, types, torch
a, b, folder, length, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
tokenizer = types.SimpleNamespace(eod=0, pad=-1, vocab_size=32000, unique_identifiers={"name": "test"})
config = GPTDatasetConfig(
    random_seed=1234, sequence_length=length, blend=([a, b], [0.7, 0.3]), split="1,0,0", tokenizer=tokenizer,
    reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, path_to_cache=folder + "/cache",
)
train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [count, 0, 0], lambda: True, config).build()
began = time.perf_counter()
total = sum(int(train[k]["tokens"].sum()) for k in range(count))
print(total, time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=200)
    args, size = parser.parse_args(), 16
    count, chance = args.batches * size, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder, prefixes = Path(name), []
        for i, documents in enumerate((10_000, 4_000)):
            prefixes.append(str(folder / f"s{i}"))
            made = (chance.integers(0, 32000, n) for n in chance.integers(100, 4000, documents))
            writer.write(folder / f"s{i}", made, np.uint16)
        data = DataConfig(
            path=f"0.7 {prefixes[0]} 0.3 {prefixes[1]}", seq_len=args.seq_len, global_batch_size=size, split="1,0,0"
        )
        cfg = Config(model=ModelConfig(vocab_size=32000), data=data, run=RunConfig(workdir=name, eval_every=0))
        samples = open_parts(cfg, folder).train_samples(cfg, 0, args.batches)
        rates = {}
        for what, segments in (("llama_fn", False), ("llama_fn, segments", True)):
            batches = BatchIterator(samples, size, 1, 32000, segments=segments)
            began = time.perf_counter()
            total = sum(int(next(batches).tokens.sum()) for _ in range(args.batches))
            rates[what] = count * args.seq_len / (time.perf_counter() - began) / 1e6
            batches.close()
        words = [*prefixes, name, str(args.seq_len), str(count)]
        done = subprocess.run(
            [sys.executable, "-P", "-c", MEGATRON, *words], cwd=folder, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        theirs, seconds = done.stdout.split()[-2:]
        assert int(theirs) == total, "other tokens"
        rates["megatron-core"] = count * args.seq_len / float(seconds) / 1e6
    for what, rate in rates.items():
        print(f"{what:20}{rate:8.1f} million tokens/s   {rate / rates['megatron-core']:5.2f} times megatron-core")


if __name__ == "__main__":
    main()
