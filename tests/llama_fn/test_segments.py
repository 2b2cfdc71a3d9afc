"""Documents packed into rows: what each computes alone, on every mesh; and what the data say of where they begin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_mixture import config, corpora

from llama_fn import tree
from llama_fn.compiler.backends import forms
from llama_fn.config import MeshConfig
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import open_parts
from llama_fn.errors import UserError
from llama_fn.model import arrays, llama, random, train_step, weights
from llama_fn.model.transforms import value_and_grad
from llama_fn.planner import config_stages

LENGTHS = [[5, 7, 4], [16], [1, 15], [8, 8]]


@pytest.fixture
def cfg(tiny_config):
    made = tiny_config(num_layers=2, num_kv_heads=2, compute_dtype="fp64")
    data = replace(made.data, seq_len=16, global_batch_size=4, microbatches=2, segments=True)
    return replace(made, data=data)


@pytest.fixture
def batch(cfg):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(0, cfg.model.vocab_size, (2, 2, 16), generator=generator)  # noqa: E731
    starts = [np.repeat(np.cumsum([0, *row[:-1]]), row) for row in LENGTHS]
    return train_step.Batch(draw(), draw(), torch.ones(2, 2, 16), torch.from_numpy(np.stack(starts)).reshape(2, 2, 16))


def test_loss_and_gradients_are_those_of_each_document_alone(cfg, batch):
    params = arrays.materialize(llama.abstract_params(cfg.model), random.key(1))
    gathered = weights.gather(params, llama.abstract_params(cfg.model))
    tokens, targets, starts = (x.flatten(0, 1) for x in (batch.tokens, batch.targets, batch.starts))

    def loss(gathered, tokens, targets, *starts):
        return llama.nll(gathered, tokens, targets, *starts, cfg=cfg.model).sum()

    packed, packed_grads = value_and_grad(loss)(gathered, tokens, targets, starts)
    total, grads = 0.0, None
    for row, lengths in enumerate(LENGTHS):
        for begin, size in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
            own = (row, slice(begin, begin + size))
            value, each = value_and_grad(loss)(gathered, tokens[own][None], targets[own][None])
            total, grads = total + value, each if grads is None else tree.map(torch.add, grads, each)
    torch.testing.assert_close(packed, total, rtol=1e-10, atol=0)
    for a, b in zip(tree.leaves(packed_grads), tree.leaves(grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    together, _ = value_and_grad(loss)(gathered, tokens, targets)
    assert abs(float(together - total)) > 1e-3, "and not those of documents that see one another"


def step(cfg, batch, backend, axes="", rules="fsdp_tp"):
    cfg = replace(cfg, mesh=MeshConfig(axes=axes, rules=rules))
    lowered = config_stages.lower(config_stages.train(cfg), cfg, config_stages.mesh(cfg))
    state = arrays.materialize(train_step.abstract_state(cfg), random.key(1))
    state, metrics = lowered.compile(backend)(state, batch, train_step.hyperparameters(cfg, "cpu"))
    return [*tree.leaves(metrics), *tree.leaves(state.params)]


@pytest.mark.parametrize(
    ("axes", "rules"),
    [("data:2,model:2", "fsdp_tp"), ("context:2", "fsdp_tp_ulysses"), ("pipe:2", "fsdp_tp"), ("model:2", "tp_sp")],
)
def test_a_mesh_computes_the_step_of_one_device(axes, rules, cfg, batch):
    want = step(cfg, batch, "eager")
    for a, b in zip(step(cfg, batch, "interpret", axes, rules), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_compiled_code_computes_the_step_of_eager(cfg, batch):
    narrow = replace(cfg, model=replace(cfg.model, compute_dtype="fp32", num_layers=1))
    narrow = replace(narrow, data=replace(cfg.data, microbatches=1))
    batch = tree.map(lambda x: x.reshape(1, 4, 16), batch)
    for a, b in zip(step(narrow, batch, "inductor"), step(narrow, batch, "eager"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv", [4, 2])
def test_the_blocked_form_is_the_reference(kv):
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(2, 257, n, 8, generator=generator, dtype=torch.float64) for n in (4, kv, kv, 4))
    begins = (torch.rand(2, 257, generator=generator) < 0.05) * torch.arange(257)
    starts = begins.cummax(1).values
    want = forms.find("attention", "reference")(q, k, v, 0.3, starts)
    got = forms.find("attention", "blocked")(q, k, v, 0.3, starts)
    back = [
        f(do, q, k, v, *want, 0.3, starts) for f in (forms.find("attention_bwd", x) for x in ("reference", "blocked"))
    ]
    for a, b in [*zip(got, want, strict=True), *zip(*back, strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_flash_attention_is_refused_and_passed_over():
    with pytest.raises(UserError, match=r"--run\.attention=flash knows no documents"):
        forms.choose("cpu", torch.float32, "flash", segments=True)
    assert forms.choose("cuda", torch.bfloat16, "auto", segments=True)["attention"] == "blocked"
    assert forms.choose("cuda", torch.bfloat16, "auto")["attention"] == "flash"


def test_batches_say_where_documents_begin_and_which_target_is_none(tmp_path):
    a, b = corpora(tmp_path, (40, 25))
    cfg = config(f"0.7 {a} 0.3 {b}", tmp_path)
    samples = open_parts(cfg, tmp_path / "work").train_samples(cfg, 0, 10)
    plain = BatchIterator(samples, 8, 2, 1000)
    packed = BatchIterator(samples, 8, 2, 1000, segments=True, mask_ends=True)
    masked = 0
    for i in range(10):
        want, got = next(plain), next(packed)
        assert want.starts is None and got.tokens.equal(want.tokens) and got.targets.equal(want.targets)
        for row, (starts, mask) in enumerate(zip(got.starts.flatten(0, 1), got.loss_mask.flatten(0, 1), strict=True)):
            lengths = [len(part) for part in samples.documents(8 * i + row)]
            begins = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
            assert starts.tolist() == begins[:-1].tolist()
            ends = {sum(lengths[: n + 1]) - 1 for n in range(len(lengths) - 1)}  # whose target is another's first token
            assert [t for t in range(16) if not mask[t]] == sorted(ends)
            masked += len(ends)
    assert masked > 20
