"""Index fields held against one another, sums of blocks, tokens looked at once, and tokenizing that goes on."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest

from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig
from llama_fn.data import indexed, integrity, samples, tokenizer, writer
from llama_fn.data.parts import open_parts
from llama_fn.errors import UserError

N = 4
LENGTHS, OFFSETS, DOCUMENTS = 34, 34 + 4 * N, 34 + 12 * N


@pytest.fixture
def pair(tmp_path):
    """Four sequences of 5, 0, 7 and 3 tokens below 100, without sums, as another program would write them."""
    writer.write(tmp_path / "x", [np.arange(n) + 10 * n for n in (5, 0, 7, 3)], np.uint16)
    integrity.sums_path(tmp_path / "x").unlink()
    return tmp_path / "x"


def patched(path, at, form, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "at, form, value, message",
    [
        (LENGTHS + 8, "<i", -7, "sequence 2 has the length -7"),
        (LENGTHS + 8, "<i", 8, "sequence 3 begins at byte 24 of x.bin, where the one before it ends at 26"),
        (LENGTHS + 12, "<i", 4, "x.bin is truncated"),
        (LENGTHS + 12, "<i", 2**31 - 1, "x.bin is truncated"),
        (LENGTHS + 12, "<i", 2, "x.bin has 30 bytes, x.idx lists 28"),
        (OFFSETS + 8, "<q", -56, "sequence 1 begins at byte -56"),
        (OFFSETS + 8, "<q", 11, "sequence 1 begins at byte 11"),
        (OFFSETS + 24, "<q", 2**62, "sequence 3 begins at byte 4611686018427387904"),
        (DOCUMENTS, "<q", 1, "document 0 begins at sequence 1"),
        (DOCUMENTS + 16, "<q", 0, "document 2 begins at sequence 0"),
        (DOCUMENTS + 32, "<q", 5, "document 4 begins at sequence 5"),
        (17, "<B", 7, "dtype code 7 is float32"),
        (17, "<B", 4, "sequence 1 begins at byte 10"),
        (18, "<Q", 2**60, "x.idx is truncated"),
        (18, "<Q", 3, "bytes beyond the"),
        (26, "<Q", 0, "bytes beyond the"),
        (9, "<Q", 2, "not a Megatron index"),
    ],
)  # fmt: skip
def test_every_field_that_contradicts_the_others_is_named(at, form, value, message, pair):
    indexed.IndexedDataset(pair)
    patched(indexed.files(pair)[1], at, form, value)
    with pytest.raises(UserError, match=message):
        indexed.IndexedDataset(pair)


@pytest.mark.parametrize("change, message", [(b"\0", "31 bytes"), (-1, "truncated"), (b"\0\0", "32 bytes")])
def test_a_bin_of_another_size_is_named(change, message, pair):
    path = indexed.files(pair)[0]
    path.write_bytes(path.read_bytes()[:change] if isinstance(change, int) else path.read_bytes() + change)
    with pytest.raises(UserError, match=message):
        indexed.IndexedDataset(pair)


def test_blocks_of_sequences_are_checked_like_one(pair, monkeypatch):
    monkeypatch.setattr(integrity, "_SEQUENCES", 2)
    indexed.IndexedDataset(pair)
    patched(indexed.files(pair)[1], OFFSETS + 24, "<q", 25)
    with pytest.raises(UserError, match=r"sequence 3 begins at byte 25 of x.bin, where the one before it ends at 24"):
        indexed.IndexedDataset(pair)


def test_tokens_are_looked_at_once_and_named_with_their_sequence(pair, monkeypatch):
    data, memory = indexed.IndexedDataset(pair), pair.with_name("verified.json")
    data.verify(100, memory)
    monkeypatch.setattr(integrity.Extremes, "add", lambda *a: pytest.fail("read again"))
    data.verify(100, memory)
    with pytest.raises(UserError, match=r"sequence 2 holds token 70, --model.vocab_size is 70"):
        data.verify(70, memory)
    monkeypatch.undo()
    patched(indexed.files(pair)[0], 26, "<H", 400)  # a file that has changed is read again
    with pytest.raises(UserError, match="sequence 3 holds token 400"):
        indexed.IndexedDataset(pair).verify(100, memory)
    memory.write_text("{")
    with pytest.raises(UserError, match="sequence 3 holds token 400"):
        indexed.IndexedDataset(pair).verify(100, memory)


def test_negative_tokens_are_named(tmp_path):
    writer.write(tmp_path / "x", [np.array([1, 2]), np.array([3, -1])], np.int32)
    with pytest.raises(UserError, match="sequence 1 holds token -1"):
        indexed.IndexedDataset(tmp_path / "x").verify(100, tmp_path / "v.json")


@pytest.mark.parametrize("block", [4, 8, 1 << 26])
def test_sums_of_blocks_are_those_of_the_file_however_it_was_written(block, tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "BLOCK_BYTES", block)
    random = np.random.default_rng(3)
    writer.write(tmp_path / "x", [random.integers(0, 99, n) for n in (3, 0, 9, 1, 4)], np.uint16)
    listed = integrity.read_sums(tmp_path / "x")
    assert set(listed) == {"x.bin", "x.idx"} and len(listed["x.bin"][1]) == -(-34 // block)
    for path in indexed.files(tmp_path / "x"):
        integrity.check_file(path, listed[path.name])
    patched(indexed.files(tmp_path / "x")[0], 10, "<H", 7)
    with pytest.raises(UserError, match=f"x.bin is damaged between byte {10 // block * block} and"):
        indexed.IndexedDataset(tmp_path / "x").verify(100, tmp_path / "v.json")


def test_damaged_sums_are_told_and_verification_can_be_left_out(tmp_path):
    writer.write(tmp_path / "x", [np.arange(50)] * 4, np.uint16)
    sums = integrity.sums_path(tmp_path / "x")
    sums.write_text(sums.read_text().replace("[", "[1, ", 1))
    cfg = Config(
        model=ModelConfig(vocab_size=100), data=DataConfig(path=str(tmp_path / "x"), seq_len=8, global_batch_size=2),
        run=RunConfig(steps=2, eval_every=0),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"x.sums.json is damaged"):
        open_parts(cfg, tmp_path)
    assert len(open_parts(replace(cfg, data=replace(cfg.data, verify=False)), tmp_path).data) == 4


def test_a_fingerprint_tells_other_tokens_apart(tmp_path):
    for name, last in (("a", 3), ("b", 3), ("c", 4)):
        writer.write(tmp_path / name, [np.array([1, 2, last])], np.uint16)
    a, b, c = (indexed.IndexedDataset(tmp_path / name).fingerprint for name in "abc")
    assert a == b and a != c and a["index_crc32"] == c["index_crc32"]
    assert json.loads(json.dumps(a)) == a


class Killed(BaseException):
    pass


@pytest.mark.parametrize("harm", [None, "tokens", "lengths", "json", "behind"])
def test_writing_goes_on_where_a_killed_process_was(harm, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "JOURNAL_S", -1.0)  # after every sequence
    rows, made = [np.arange(n) for n in (5, 0, 7, 3, 9)], []

    def sequences(done):
        made.append(done)
        for i, row in enumerate(rows[done:], done):
            if len(made) == 1 and i == 3:
                raise Killed
            yield row

    with pytest.raises(Killed):
        writer.write_on(tmp_path / "x", sequences, np.uint16)
    assert not indexed.exists(tmp_path / "x")
    (partial,) = tmp_path.glob(f".x.*{ {'behind': 'bin', None: 'bin', 'tokens': 'bin'}.get(harm, harm) }.partial")
    content = partial.read_bytes()
    if harm == "behind":
        partial.write_bytes(content + b"what was on disk but not in the journal")
    elif harm:
        partial.write_bytes(b"\1" + content[1:])
    said = []
    assert writer.write_on(tmp_path / "x", sequences, np.uint16, said.append) == (5, 24)
    assert made[1] == (0 if harm in ("tokens", "lengths", "json") else 3) and said == [3] * (made[1] == 3)
    data = indexed.IndexedDataset(tmp_path / "x")
    assert [data.read(i, 0, int(n)).tolist() for i, n in enumerate(data.lengths)] == [row.tolist() for row in rows]
    data.verify(10, tmp_path / "v.json")
    assert not list(tmp_path.glob(".*"))


def test_a_corpus_that_changed_is_tokenized_anew_with_its_own_tokenizer(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    text = "".join(f"def f{i}(x): return x + {i}  # words and words\n" for i in range(400))
    (folder / "a.txt").write_text(text)
    cfg = Config(
        model=ModelConfig(vocab_size=300), data=DataConfig(path=str(folder), seq_len=8, split="1"),
        run=RunConfig(eval_every=0),
    )  # fmt: skip
    first = open_parts(cfg, tmp_path / "work").data
    again = open_parts(cfg, tmp_path / "work").data
    (folder / "a.txt").write_text(text.replace("words", "other"))
    other = open_parts(cfg, tmp_path / "work").data
    assert first.prefix == again.prefix != other.prefix and first.fingerprint != other.fingerprint
    assert len(list((tmp_path / "work" / "data").glob("tokenizer_*.model"))) == 2
    model = next((tmp_path / "work" / "data").glob("tokenizer_*.model"))
    patched(model, 40, "<B", model.read_bytes()[40] ^ 1)
    with pytest.raises(UserError, match="is damaged between byte 0"):
        tokenizer.load(model)


def test_an_order_larger_than_memory_is_refused_before_it_is_made(pair, monkeypatch):
    data = indexed.IndexedDataset(pair)
    with pytest.raises(UserError, match=r"go over \d+ epochs.*GB are free. Lower --run.steps"):
        samples.Samples(data, (0, 4), 2, 10**11, 1, "train")
    monkeypatch.setattr(samples, "available_bytes", lambda: 1000.0)
    samples.Samples(data, (0, 4), 2, 50, 1, "train")
    with pytest.raises(UserError, match="the train samples"):
        samples.Samples(data, (0, 4), 2, 200, 1, "train")
