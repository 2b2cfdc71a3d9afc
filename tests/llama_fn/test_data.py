"""Data against megatron-core's own reader and sampler, worked examples, and inputs that are wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig
from llama_fn.data import corpus, indexed, iterator, orders, prepare, skips, tokenizer, writer
from llama_fn.data import samples as samples_module
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import open_parts
from llama_fn.data.samples import Samples, split_ranges
from llama_fn.errors import UserError


def write(prefix, lengths, seed=0):
    random = np.random.default_rng(seed)
    writer.write(prefix, [random.integers(0, 1000, n) for n in lengths], np.uint16)
    return indexed.IndexedDataset(prefix)


def test_files_have_the_bytes_of_the_format(tmp_path):
    documents = [np.array([10, 11, 12]), np.array([13]), np.arange(14, 19)]
    writer.write(tmp_path / "x", documents, np.uint16)
    assert (tmp_path / "x.bin").read_bytes().hex() == "0a000b000c000d000e000f00100011001200"
    idx = (tmp_path / "x.idx").read_bytes()
    assert len(idx) == 102
    assert idx.hex().startswith("4d4d494449445800000100000000000000080300000000000000" + "0400000000000000")


def test_order_of_the_worked_example(tmp_path):
    lengths = [5, 9, 3, 12, 7, 1, 20, 4, 6, 11]
    samples = Samples(write(tmp_path / "x", lengths), (0, 10), 8, 9, 1234, "train")
    assert samples.sequences.tolist() == [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]
    rows = [[0, 0], [2, 1], [2, 9], [3, 6], [5, 0], [6, 2], [8, 2], [8, 10], [8, 18], [9, 6]]
    assert [list(samples.row(i)) for i in range(10)] == rows
    assert samples.shuffle.tolist() == [7, 3, 5, 1, 4, 8, 0, 2, 6]


CASES = [(9, 8, "1"), (60, 8, "90,5,5"), (25, 16, "8,1,1"), (31, 7, "5,4,1")]
LENGTHS = np.random.default_rng(5).integers(1, 40, 30).tolist()


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """The folder of one corpus, and of what megatron-core makes of it in every case: one process imports it once."""
    folder = tmp_path_factory.mktemp("megatron")
    write(folder / "x", LENGTHS)
    specs = [
        {"seed": 1234, "count": count, "seq_len": seq_len, "split": ",".join([*split.split(","), "0", "0"][:3])}
        for count, seq_len, split in CASES
    ]
    script = Path(__file__).with_name("megatron_oracle.py")
    command = [sys.executable, "-P", str(script), str(folder / "x"), str(folder), json.dumps(specs)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=240)
    return folder


@pytest.mark.parametrize("count, seq_len, split", CASES, ids=str)
def test_samples_equal_megatron_cores(count, seq_len, split, megatron):
    data = indexed.IndexedDataset(megatron / "x")
    samples = Samples(data, split_ranges(split, len(data))[0], seq_len, count, 1234, "train")
    want = np.load(megatron / f"{count}.npz")
    assert want["lengths"].tolist() == LENGTHS
    assert np.array_equal(want["first"], data.read(0, 0, LENGTHS[0]))
    assert np.array_equal(want["documents"], data.documents)
    assert np.array_equal(np.stack([samples[k] for k in range(count)]), want["samples"])


def test_batches_do_not_depend_on_microbatches_and_resume_exactly(tmp_path):
    samples = Samples(write(tmp_path / "x", [50] * 20), (0, 20), 8, 40, 1, "train")
    whole = BatchIterator(samples, 4, 1, 1000)
    split = BatchIterator(samples, 4, 2, 1000)
    for _ in range(3):
        a, b = next(whole), next(split)
        assert np.array_equal(a.tokens.flatten(), b.tokens.flatten())
    resumed = BatchIterator(samples, 4, 1, 1000, **{"consumed": whole.state()["consumed_samples"]})
    assert np.array_equal(next(resumed).tokens, next(whole).tokens)
    assert sum(1 for _ in iter(lambda: next(resumed, None), None)) == 6


def test_a_batch_that_somebody_waits_for_is_not_put_off(tmp_path, monkeypatch):
    monkeypatch.setattr(iterator, "HEAD_START_S", 600)
    batches = BatchIterator(Samples(write(tmp_path / "x", [50] * 20), (0, 20), 8, 40, 1, "train"), 4, 1, 1000)
    with ThreadPoolExecutor(1) as pool:
        made = [pool.submit(next, batches).result(timeout=60) for _ in range(3)]
    assert len({tuple(batch.tokens.flatten().tolist()) for batch in made}) == 3
    batches.close()


def config(tmp_path, path, **data):
    return Config(
        model=ModelConfig(vocab_size=300),
        data=DataConfig(path=str(path), seq_len=8, global_batch_size=2, **data),
        run=RunConfig(workdir=str(tmp_path / "work"), steps=2, eval_batches=1),
    )


@pytest.mark.parametrize(("pieces", "why"), [(200, r"its characters and the 256 bytes alone take 2\d\d\."),
                                             (4000, r"it has at most \d+\.")])  # fmt: skip
def test_a_vocabulary_that_cannot_be_trained_says_what_could(pieces, why, tmp_path):
    with pytest.raises(
        UserError, match=rf"--model.vocab_size={pieces} pieces can be trained on this corpus: {why} Give"
    ):
        tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 9, pieces, tmp_path / "t.model")


def test_text_is_tokenized_once_and_decodes_back(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"def f{i}(x):\n\treturn  x + {i}  # 世界\n" * 5 for i in range(40)]
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(text)
    cfg = config(tmp_path, folder, split="8,2,0")
    parts = open_parts(cfg, tmp_path / "work")
    (model,) = (tmp_path / "work" / "data").glob("tokenizer_*.model")
    pieces, data = tokenizer.load(model), parts.data
    assert len(data) == 40 and parts.valid_samples(cfg) is not None
    every = [data.read(i, 0, int(data.lengths[i])).tolist() for i in range(40)]
    assert {ids[-1] for ids in every} == {pieces.eos_id()}
    assert sorted(pieces.decode(ids[:-1]) for ids in every) == sorted(texts)
    monkeypatch.setattr(prepare, "_tokenize", lambda *a: pytest.fail("tokenized twice"))
    open_parts(cfg, tmp_path / "work")


def test_jsonl_documents_are_read_by_key(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert list(corpus.documents(str(file), "text")) == ["one", "two"]
    file.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(UserError, match=r"x.jsonl:2 has no text under --data.jsonl_key=text; found \['body'\]"):
        list(corpus.documents(str(file), "text"))


def test_wrong_corpora_are_named(tmp_path):
    cases = {
        "missing.txt": (None, "no such file"),
        "empty.txt": (b"", "is empty"),
        "blank.jsonl": (b"\n\n", "holds no text"),
        "binary.txt": (b"\x7fELF\0\0", "binary file"),
        "latin.txt": ("é".encode("latin-1") * 3, "not UTF-8"),
        "broken.jsonl": (b"{oops\n", "broken.jsonl:1 is not JSON"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(corpus.documents(str(tmp_path / name), "text"))


def test_truncated_files_are_named(tmp_path):
    write(tmp_path / "x", [5, 6, 7])
    idx, bin_ = tmp_path / "x.idx", tmp_path / "x.bin"
    good_idx, good_bin = idx.read_bytes(), bin_.read_bytes()
    for idx_bytes, bin_bytes, message in (
        (good_idx[:60], good_bin, "x.idx is truncated"),
        (good_idx[:10], good_bin, "x.idx is truncated"),
        (good_idx, good_bin[:-4], "x.bin is truncated"),
        (b"GARBAGE!!" + good_idx[9:], good_bin, "not a Megatron index"),
    ):
        idx.write_bytes(idx_bytes)
        bin_.write_bytes(bin_bytes)
        with pytest.raises(UserError, match=message):
            indexed.IndexedDataset(tmp_path / "x")
    bin_.unlink()
    with pytest.raises(UserError, match=r"x.bin is missing"):
        indexed.IndexedDataset(tmp_path / "x")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("some words to learn from, again and again\n" * 50)
    tokenizer.train(["some words to learn from " * 50], 280, tmp_path / "t.model")
    cfg = config(tmp_path, tmp_path / "t.txt", tokenizer=str(tmp_path / "t.model"))
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=32000))
    with pytest.raises(UserError, match=r"280 pieces, the model --model.vocab_size=32000 rows"):
        open_parts(cfg, tmp_path / "work")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        tokenizer.load(tmp_path / "bad.model")


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    samples = Samples(write(tmp_path / "x", [50] * 4), (0, 4), 8, 4, 1, "train")
    with pytest.raises(UserError, match="made with another tokenizer"):
        next(BatchIterator(samples, 4, 1, 10))


def test_a_split_of_nothing_is_refused(tmp_path):
    data = write(tmp_path / "x", [5, 6])
    with pytest.raises(UserError, match="0 of 2 documents"):
        Samples(data, split_ranges("0,1", 2)[0], 4, 1, 1, "train")
    with pytest.raises(UserError, match="sum to 0"):
        split_ranges("0,0", 2)


def test_long_orders_are_made_once_mapped_and_made_again_when_damaged(tmp_path, monkeypatch, caplog):
    data = write(tmp_path / "x", LENGTHS)
    want = Samples(data, (0, 30), 8, 200, 1234, "train")
    monkeypatch.setattr(orders, "LEAST", 1)

    def kept():
        return Samples(data, (0, 30), 8, 200, 1234, "train", tmp_path / "cache")

    def equal(samples):
        arrays = [(s.sequences, s.ends, s.shuffle) for s in (samples, want)]
        return all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))

    with ThreadPoolExecutor(4) as threads:  # who is first makes it
        assert all(map(equal, threads.map(lambda _: kept(), range(8))))
    (folder,) = (tmp_path / "cache").iterdir()
    shuffles = []
    monkeypatch.setattr(samples_module, "_repeat_shuffled", lambda *args: shuffles.append(args))
    assert equal(kept()) and isinstance(kept().shuffle, np.memmap) and not shuffles
    monkeypatch.undo()
    monkeypatch.setattr(orders, "LEAST", 1)
    for name in ("shuffle.npy", "ends.npy", "sums.json"):
        raw = bytearray((folder / name).read_bytes())
        raw[-3] ^= 1
        (folder / name).write_bytes(raw)
        assert equal(kept()), name
    assert "shuffle.npy is damaged" in caplog.text
    (folder / "ends.npy").unlink()
    assert equal(kept()) and sorted(p.name for p in folder.iterdir()) == [
        "ends.npy", "sequences.npy", "shuffle.npy", "sums.json"
    ]  # fmt: skip
    os.utime(folder / "ends.npy")  # copied: looked at once more, and good
    caplog.clear()
    assert equal(kept()) and not caplog.text
    assert len(list((tmp_path / "cache").iterdir())) == 1
    Samples(data, (0, 30), 8, 200, 1235, "train", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2, "another seed is another order"


def test_ranges_that_are_skipped_are_in_no_batch_and_a_resume_knows_them(tmp_path):
    samples = Samples(write(tmp_path / "x", [50] * 60), (0, 60), 8, 200, 1, "train")
    skipped = skips.ranges("10:13, 40:52")

    def read(consumed=0, count=100):
        batches = BatchIterator(samples, 8, 1, 1000, consumed, skipped=skipped)
        seen = [(batches.consumed, next(batches).tokens, batches.consumed) for _ in range(count)]
        return [(end, tokens) for _, tokens, end in seen]

    whole = read(count=12)
    # 0..8 | 8..16 holds 10: from 13 | 21 | 29..37 | 37..45 holds 40: from 52
    assert [end for end, _ in whole[:6]] == [8, 21, 29, 37, 60, 68]
    for end, tokens in whole:
        want = np.stack([samples[k][:-1] for k in range(end - 8, end)])
        assert np.array_equal(tokens[0].numpy(), want)
    for i in range(11):
        assert all(
            a[0] == b[0] and a[1].equal(b[1]) for a, b in zip(read(whole[i][0], 11 - i), whole[i + 1 :], strict=True)
        )
    for consumed in (0, 8, 21, 37, 60):
        steps, at = 0, consumed
        while at < 100:
            at, steps = skips.after(at, 8, skipped) + 8, steps + 1
        assert at == consumed + 8 * steps + skips.ahead(consumed, 8, skipped), consumed


@pytest.mark.parametrize("text", ["5", "5:5", "9:3", "a:b", "1:2:3", "10:20,15:30", "-1:4"])
def test_ranges_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"--data\.skip"):
        skips.ranges(text)
