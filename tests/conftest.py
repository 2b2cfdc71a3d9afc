"""Shared fixtures: tiny configs, and one compile cache for the whole session."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


# Files that take a minute or more, the longest first: each is run by one process, and begun late it would keep that one
# alone at the end.
LONGEST = (
    "npu/test_lowering", "multirank/test_processes", "llama_fn/test_stages", "npu/test_ge_interpreter", "test_train",
    "sharding/test_partition", "guards/test_work_folders", "llama_fn/test_pipeline", "sharding/test_kernels_sharded",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    rank = {here / f"{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def tiny(**model):
    """A two-layer GQA model and a batch that a test can afford."""
    shape = {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "vocab_size": 64}
    return Config(
        model=ModelConfig(**{**shape, **model}),
        data=DataConfig(seq_len=16, global_batch_size=4),
        run=RunConfig(steps=10),
    )


@pytest.fixture
def tiny_config():
    return tiny


@pytest.fixture
def nobody_helps(monkeypatch):
    """Every step is compiled by the process of the test."""
    from llama_fn.run import compiling

    monkeypatch.setattr(compiling, "compiled_ahead", lambda *_: nullcontext(lambda step: None))


@pytest.fixture
def random_inputs():
    """What a step takes besides its state: a batch of random tokens, and the hyper-parameters."""
    from llama_fn.model.train_step import Batch, hyperparameters

    def make(cfg, seed=0):
        m, size = cfg.data.microbatches, cfg.data.global_batch_size
        generator = torch.Generator().manual_seed(seed)
        shape = (m, size // m, cfg.data.seq_len + 1)
        ids = torch.randint(0, cfg.model.vocab_size, shape, generator=generator)
        mask = (torch.rand(ids[..., 1:].shape, generator=generator) > 0.1).float()
        starts = None
        if cfg.data.segments:  # a document begins at one token of eight
            at = torch.arange(ids.shape[-1] - 1)
            starts = ((torch.rand(mask.shape, generator=generator) < 0.125) * at).cummax(-1).values
        return Batch(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), mask, starts), hyperparameters(cfg)

    return make


@pytest.fixture
def fresh_state():
    from llama_fn.model import arrays, random, train_step

    def make(cfg, seed=0):
        return arrays.materialize(train_step.abstract_state(cfg), random.key(seed))

    return make


@pytest.fixture
def with_data():
    def change(cfg, **data):
        return replace(cfg, data=replace(cfg.data, **data))

    return change


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")
