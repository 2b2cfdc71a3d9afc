"""Mixtures against megatron-core's blends, and what a mixture file may not be."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig
from llama_fn.data import blend, identity, mixture, prepare, tokenizer, writer
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import open_parts
from llama_fn.errors import UserError

LLAMA = [67, 15, 4.5, 4.5, 4.5, 2.5, 2]


def megatron(folder, prefix, specs):
    script = Path(__file__).with_name("megatron_oracle.py")
    command = [sys.executable, "-P", str(script), prefix, str(folder), json.dumps(specs)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=240)


def made(order, count):
    pairs = [order[k] for k in range(count)]
    return [source for source, _ in pairs], [index for _, index in pairs]


def test_the_order_is_megatrons_in_a_thousand_random_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(blend, "CHUNK", 256)
    chance = np.random.default_rng(0)
    cases = [(LLAMA, 20_000)]
    for _ in range(1000):
        weights = chance.choice([0.1, 0.25, 1, 2, 3, 7, *chance.random(4)], chance.integers(2, 9))
        cases.append((weights.tolist(), int(chance.integers(1, 400))))
    (tmp_path / "orders.json").write_text("")
    megatron(tmp_path, "orders", cases)
    found = np.load(tmp_path / "orders.npz")
    assert made(blend.Order(LLAMA), 24)[0] == [0, 1, 0, 2, 0, 0, 3, 0, 4, 0, 0, 1, 0, 0, 0, 5, 0, 1, 0, 0, 6, 0, 0, 1]
    for number, (weights, size) in enumerate(cases):
        sources, indices = made(blend.Order(weights), size)
        assert sources == found[f"sources_{number}"].tolist(), weights
        assert indices == found[f"indices_{number}"].tolist(), weights


def corpora(folder, sizes, seed=0):
    chance = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        writer.write(
            folder / f"s{i}", [chance.integers(0, 1000, n) for n in chance.integers(5, 60, size)], np.uint16
        )  # fmt: skip
    return [str(folder / f"s{i}") for i in range(len(sizes))]


def config(path, folder, **data):
    return Config(
        model=ModelConfig(vocab_size=1000),
        data=DataConfig(path=path, seq_len=16, global_batch_size=8, split="8,2,0", **data),
        run=RunConfig(workdir=str(folder / "work"), eval_every=10, eval_batches=2),
    )


def test_samples_are_megatrons_from_the_first_to_the_last(tmp_path):
    prefixes = corpora(tmp_path, (40, 25, 12))
    specs = [
        {"seed": 1234, "count": count, "seq_len": 16, "split": "8,2,0", "blend": prefixes, "weights": weights}
        for count, weights in ((80, [0.6, 0.3, 0.1]), (240, [0.2, 0.5, 0.3]))
    ]
    megatron(tmp_path, "blend", specs)
    for spec in specs:
        text = " ".join(f"{w} {p}" for w, p in zip(spec["weights"], prefixes, strict=True))
        parts = open_parts(config(text, tmp_path), tmp_path / "work")
        samples = parts.train_samples(config(text, tmp_path), 0, spec["count"] // 8)
        want = np.load(tmp_path / f"blend_{spec['count']}.npz")["samples"]
        assert np.array_equal(np.stack([samples[k] for k in range(spec["count"])]), want)


def written(folder, text):
    (folder / "mixture.yaml").write_text(text)
    return str(folder / "mixture.yaml")


def test_a_file_of_sources_is_the_same_as_megatrons_list(tmp_path, caplog):
    caplog.set_level("INFO")
    a, b = corpora(tmp_path, (40, 25))
    path = written(
        tmp_path,
        f"""
sources:
  - {{name: first, path: {a}, weight: 3}}
  - {{name: second, path: {b}, weight: 1, valid: false}}
""",
    )
    results = []
    for each in (path, f"3 {a} 1 {b}"):
        cfg = config(each, tmp_path)
        parts = open_parts(cfg, tmp_path / "work")
        samples = parts.train_samples(cfg, 0, 10)
        results.append(np.stack([samples[k] for k in range(80)]))
    assert np.array_equal(*results)
    named = open_parts(config(path, tmp_path), tmp_path / "work")
    assert list(named.valid_samples(config(path, tmp_path))) == ["first"]
    assert "  first " in caplog.text and "75.00%" in caplog.text and "mixture of 2 sources, 80 samples" in caplog.text


def test_batches_go_on_from_a_state_wherever_it_was_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(blend, "CHUNK", 32)
    a, b = corpora(tmp_path, (40, 25))
    cfg = config(f"0.7 {a} 0.3 {b}", tmp_path)
    parts = open_parts(cfg, tmp_path / "work")

    def iterator(done=0, known={}):  # noqa: B006
        samples = parts.train_samples(cfg, done, 30 - done // 8, known)
        return BatchIterator(samples, 8, 2, 1000, done)

    whole, states, batches = iterator(), [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(whole.state())))
        batches.append(next(whole).tokens)
    for at in (0, 3, 4, 5, 17, 29):
        again = iterator(states[at]["consumed_samples"], states[at])
        assert all(next(again).tokens.equal(batches[i]) for i in range(at, 30))
        counted = again.samples.order.starts
        assert at < 5 or 1 not in counted or at * 8 // 32 == 1, "chunks before the state are not made again"


def test_two_hosts_read_the_rows_of_one(tmp_path):
    """And of four; the first thousand batches of LLaMA's seven sources."""
    paths = corpora(tmp_path, (40, 25, 12, 12, 12, 9, 8))
    weights = (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02)
    cfg = config(" ".join(f"{weight} {path}" for weight, path in zip(weights, paths, strict=True)), tmp_path)
    parts = open_parts(cfg, tmp_path / "work")

    def batches(rows):
        each = BatchIterator(parts.train_samples(cfg, 0, 1000), 8, 1, 1000, rows=rows)
        return np.stack([next(each).tokens.numpy() for _ in range(1000)])

    whole = batches(slice(None))
    for hosts in (2, 4):
        size = 8 // hosts
        split = [batches(slice(i * size, (i + 1) * size)) for i in range(hosts)]
        assert np.array_equal(np.concatenate(split, 2), whole)


def test_texts_share_one_tokenizer_and_what_another_made_is_refused(tmp_path):
    texts = {"one": "the first corpus has words of its own\n", "two": "another corpus, with others in it\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text * 400)
    path = written(
        tmp_path,
        f"""
sources:
  - {{name: one, path: {tmp_path}/one.txt, weight: 1}}
  - {{name: two, path: {tmp_path}/two.txt, weight: 1}}
""",
    )
    cfg = replace(config(path, tmp_path), model=ModelConfig(vocab_size=300))
    cfg = replace(cfg, data=replace(cfg.data, split="1,0,0"))
    parts = open_parts(cfg, tmp_path / "work")
    made = [part.data.prefix for part in parts.parts]
    assert len(list((tmp_path / "work" / "data").glob("tokenizer_*.model"))) == 1
    pieces = prepare.tokenizer_of(cfg, tmp_path / "work")
    assert [pieces.decode(part.data.read(0, 0, 200).tolist())[:9] for part in parts.parts] == ["the first", "another c"]
    tokenizer.train([texts["one"] * 400], 300, tmp_path / "other.model")
    other = replace(
        cfg, data=replace(cfg.data, path=f"1 {made[0]} 1 {made[1]}", tokenizer=str(tmp_path / "other.model"))
    )
    with pytest.raises(UserError, match=r"was made with the tokenizer tokenizer_\w+\.model .*other\.model"):
        open_parts(other, tmp_path / "work")
    identity.note(made[1], tmp_path / "other.model")
    with pytest.raises(UserError, match="their tokens mean different text"):
        open_parts(replace(other, data=replace(other.data, tokenizer="")), tmp_path / "work")


def test_a_cap_is_kept_and_much_repetition_is_said(tmp_path, caplog):
    a, b = corpora(tmp_path, (40, 5))
    cfg = config(f"1 {a} 1 {b}", tmp_path)
    open_parts(cfg, tmp_path / "work").train_samples(cfg, 0, 100)
    assert "source s1 will be read" in caplog.text
    lines = f"sources: [{{name: a, path: {a}, weight: 1}}, {{name: b, path: {b}, weight: 1, epochs: 2}}]"
    capped = config(written(tmp_path, lines), tmp_path)
    with pytest.raises(UserError, match=r"source b would be read .* times, and its epochs are 2"):
        open_parts(capped, tmp_path / "work").train_samples(capped, 0, 100)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: []", "expected `sources:`"),
        ("- a\n", "expected `sources:` with a list of sources, found list"),
        ("sources: [1", "is not YAML"),
        ("sources: [{name: a, path: x}]", "source 1: weight is missing"),
        ("sources: [{name: a, path: x, weigt: 1}]", "source 1: weigt is no key of a source. Did you mean weight?"),
        ("sources: [{name: a, path: x, weight: 0}]", "source a has the weight 0; weights are above 0"),
        ("sources: [{name: a, path: x, weight: -1}]", "source a has the weight -1"),
        ("sources: [{name: a, path: x, weight: .nan}]", "source a has the weight nan"),
        ("sources: [{name: a, path: x, weight: true}]", "source 1: weight is True; expected int or float"),
        ("sources: [{name: 3, path: x, weight: 1}]", "source 1: name is 3; expected str"),
        ("sources: [{name: a/b, path: x, weight: 1}]", "letters, digits"),
        ("sources: [{name: a, path: x, weight: 1}, {name: a, path: y, weight: 1}]", "two sources are called 'a'"),
        ("sources: [{name: a, path: '', weight: 1}]", "source a has no path"),
        ("sources: [{name: a, path: x, weight: 1, epochs: -1}]", "source a has epochs -1"),
        ("sources: [{name: a, path: x, weight: 1}]\nseed: 1", "seed is no key of a mixture"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_wrong_files_are_refused_by_name(text, said, tmp_path):
    with pytest.raises(UserError, match=said.replace("?", r"\?")) as error:
        mixture.sources(written(tmp_path, text))
    assert "mixture.yaml" in str(error.value)


def test_a_source_that_is_missing_is_named(tmp_path):
    (a,) = corpora(tmp_path, (40,))
    cfg = config(f"1 {a} 1 {tmp_path}/gone", tmp_path)
    with pytest.raises(UserError, match="gone"):
        prepare.check(cfg)


def test_one_path_is_one_source_whatever_it_looks_like(tmp_path):
    (tmp_path / "1 a 2 b").write_text("text")
    assert mixture.sources(str(tmp_path / "1 a 2 b")) == [mixture.Source("", str(tmp_path / "1 a 2 b"))]
    assert mixture.sources("two words")[0].path == "two words"
    assert [s.weight for s in mixture.sources("1 x 2e-1 y")] == [1, 0.2]
