"""Corpora of any kind to token files: the same documents, the same bytes, whatever happens in between."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import csv, feather, parquet

from llama_fn.data import corpus, indexed, tokenizer, writer
from llama_fn.data.streams import Reading
from llama_fn.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["first, with a comma\nand a line", 'second "quoted" — ü 字', "third", "x" * 5000]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    tokenizer.train([Path(json.__file__).read_text() * 4], 400, path)
    return path


def lines(texts=TEXTS):
    return "".join(json.dumps({"text": text, "n": {"deep": text}}) + "\n" for text in texts).encode()


def table():
    return pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})


def stream(path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as out:
        out.write_table(table(), max_chunksize=2)


WRITERS = {
    "a.jsonl": lambda p: p.write_bytes(lines()),
    "a.json": lambda p: p.write_text(json.dumps([{"text": text} for text in TEXTS])),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines())),
    "a.jsonl.xz": lambda p: p.write_bytes(lzma.compress(lines())),
    "a.jsonl.zst": lambda p: p.write_bytes(zstandard.compress(lines(TEXTS[:2])) + zstandard.compress(lines(TEXTS[2:]))),
    "a.csv": lambda p: csv.write_csv(table(), p),
    "a.csv.gz": lambda p: (csv.write_csv(table(), p), p.write_bytes(gzip.compress(p.read_bytes()))),
    "a.parquet": lambda p: parquet.write_table(table(), p, row_group_size=2),
    "a.feather": lambda p: feather.write_feather(table(), p, compression="zstd"),
    "data-00000-of-00001.arrow": stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_documents_of_every_format_are_those_that_were_written(name, tmp_path):
    WRITERS[name](tmp_path / name)
    reading = Reading()
    assert list(corpus.of_files([tmp_path / name], reading, named=True)) == TEXTS
    assert reading.bytes == (tmp_path / name).stat().st_size
    assert corpus.files(tmp_path) == [tmp_path / name], "found in a folder"
    if "json" in name and name != "a.json":
        assert list(corpus.of_files([tmp_path / name], Reading("n.deep"), named=True)) == TEXTS


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "a.csv"])
def test_damage_is_an_error_that_names_the_file(name, tmp_path):
    WRITERS[name](tmp_path / name)
    good = (tmp_path / name).read_bytes()
    for damaged in (good[: len(good) // 2], b"\0\1\2\3" + good[4:]):
        (tmp_path / name).write_bytes(damaged)
        try:
            assert list(corpus.of_files([tmp_path / name], Reading(), named=True)) == TEXTS  # parquet's first bytes
        except UserError as error:
            assert name in str(error)
        else:
            assert name == "a.parquet" and len(damaged) == len(good)


def test_a_column_that_is_missing_or_holds_numbers_is_refused(tmp_path):
    for name in ("a.parquet", "data-00000-of-00001.arrow"):
        WRITERS[name](tmp_path / name)
        with pytest.raises(UserError, match=r"no column --data.jsonl_key=body; it has \['id', 'text'\]"):
            list(corpus.of_files([tmp_path / name], Reading("body"), named=True))
        with pytest.raises(UserError, match="the column holds int64, and texts are expected"):
            list(corpus.of_files([tmp_path / name], Reading("id"), named=True))


def test_texts_of_tables_that_are_not_utf8_follow_the_same_policy_and_damaged_offsets_are_an_error(tmp_path):
    """Arrow takes both as they are; using such an offset would end the process."""
    raw = pa.array([b"good", b"b\xffd", b"more"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    offsets = pa.py_buffer(np.array([0, 4, 1 << 30, 11], np.int32).tobytes())
    far = pa.Array.from_buffers(pa.string(), 3, [None, offsets, raw.buffers()[2]])
    for name, column in (("a.arrow", texts), ("far.arrow", far)):
        with (
            pa.OSFile(str(tmp_path / name), "wb") as sink,
            pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as w,
        ):
            w.write_batch(pa.record_batch([column], ["text"]))
    read = lambda name, **more: [*corpus.of_files([tmp_path / name], Reading(**more), named=True)]  # noqa: E731
    with pytest.raises(UserError, match=r"a\.arrow: a text is not UTF-8"):
        read("a.arrow")
    assert read("a.arrow", errors="replace") == ["good", "b\ufffdd", "more"]
    assert read("a.arrow", errors="skip") == ["good", "more"]
    with pytest.raises(UserError, match=r"far\.arrow cannot be read as \.arrow: .*offset"):
        read("far.arrow")


def test_bytes_that_are_not_utf8_are_an_error_replaced_or_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "b\xffd"}\n{"text": "more"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff text")
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not UTF-8"):
        list(corpus.of_files(files, Reading(), named=True))
    replace, skip = Reading(errors="replace"), Reading(errors="skip")
    assert list(corpus.of_files(files, replace, named=True)) == ["good", "b\ufffdd", "more", "\ufffd text"]
    assert list(corpus.of_files(files, skip, named=True)) == ["good", "more"]
    assert (replace.replaced, replace.skipped, skip.replaced, skip.skipped) == (2, 0, 0, 2)


def tool(*words, **options):
    command = [sys.executable, "-m", "llama_fn.tools.preprocess", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def files_of(prefix):
    return [path.read_bytes() for path in indexed.files(Path(prefix))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Text enough for some seconds."""
    folder = tmp_path_factory.mktemp("sources")
    texts = [p.read_text() for p in sorted(Path(json.__file__).parents[1].glob("*.py"))[:100]]
    for i in range(3):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def whole(sources, model, tmp_path_factory):
    """Its tokens from one process, and the words of the command."""
    prefix = tmp_path_factory.mktemp("whole") / "x"
    words = [sources, f"--tokenizer={model}"]
    done = tool(*words, f"--out={prefix}", "--workers=1")
    assert done.returncode == 0, done.stderr
    return words, prefix


def test_tokens_are_those_of_a_plain_loop_whatever_the_processes(whole, sources, model, tmp_path):
    words, prefix = whole
    pieces = tokenizer.load(model)
    texts = [json.loads(line)["text"] for file in sorted(sources.iterdir()) for line in file.read_text().splitlines()]
    want = [np.array([*pieces.encode(text), pieces.eos_id()]) for text in texts if text.strip()]
    writer.write(tmp_path / "loop", want, np.uint16)
    assert files_of(prefix) == files_of(tmp_path / "loop")
    done = tool(*words, f"--out={tmp_path / 'three'}", "--workers=3")
    assert files_of(tmp_path / "three") == files_of(prefix) and "documents" in done.stdout
    again = tool(*words, f"--out={tmp_path / 'three'}")
    assert "nothing to do" in again.stdout
    other = tool(*words, f"--out={tmp_path / 'three'}", "--bos")
    assert other.returncode == 2 and "made of something else" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_and_started_again_the_bytes_are_the_same(kills, whole, tmp_path):
    words, prefix = whole
    chance, prefix_here = random.Random(0), tmp_path / "x"
    command = [sys.executable, "-m", "llama_fn.tools.preprocess", *map(str, words), f"--out={prefix_here}"]
    # A journal after every document, so that there is something to go on from in so short a time.
    patched = f"import sys; from llama_fn.data import writer; writer.JOURNAL_S = 0.05; sys.argv = {command[2:]!r}; "
    patched += "import runpy; runpy.run_module('llama_fn.tools.preprocess', run_name='__main__')"
    gone_on, further = 0, prefix.with_suffix(".bin").stat().st_size // (3 * kills)
    for _ in range(kills):
        run = subprocess.Popen([sys.executable, "-c", patched], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        partial = list(tmp_path.glob(".x.*.bin.partial"))
        size = partial[0].stat().st_size if partial else 0
        while run.poll() is None:
            partial = list(tmp_path.glob(".x.*.bin.partial"))
            if partial and partial[0].stat().st_size > size + further:
                break
            time.sleep(0.002)
        time.sleep(0.01 * chance.random())
        run.send_signal(signal.SIGKILL)
        gone_on += "documents were done before" in run.communicate()[1]
    done = tool(*words, f"--out={prefix_here}")
    assert done.returncode == 0, done.stderr
    assert gone_on + ("documents were done before" in done.stderr) >= kills // 2
    assert files_of(prefix_here) == files_of(prefix)
    time.sleep(0.5)
    left = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _of(p, str(prefix_here))]
    assert not left, "no process outlives the one that was killed"


def _of(process, word):
    try:
        return word in (process / "cmdline").read_text() and process.name != str(os.getpid())
    except OSError:
        return False


def test_token_files_are_joined_taken_apart_and_looked_at(whole, model, tmp_path):
    _, prefix = whole
    data = indexed.IndexedDataset(prefix)
    done = tool("split", prefix, "--weights=8,1,1", f"--out={tmp_path / 'part'}")
    assert done.returncode == 0, done.stderr
    parts = [indexed.IndexedDataset(tmp_path / f"part_{name}") for name in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [round(0.8 * len(data)), round(0.9 * len(data)) - round(0.8 * len(data)),
                                             len(data) - round(0.9 * len(data))]  # fmt: skip
    joined = tool("merge", *(part.prefix for part in parts), f"--out={tmp_path / 'joined'}")
    assert joined.returncode == 0 and files_of(tmp_path / "joined") == files_of(prefix), joined.stderr
    seen = tool("inspect", f"{prefix}.bin", f"--tokenizer={model}", "--document=0")
    first = json.loads((next(iter(sorted(whole[0][0].iterdir())))).read_text().splitlines()[0])["text"]
    assert first[:200] in seen.stdout and f"{len(data)} documents" in seen.stdout and "byte pieces" in seen.stdout
    good = tool("verify", prefix, f"--tokenizer={model}")
    assert good.returncode == 0 and "good" in good.stdout, good.stderr
    bad = tool("verify", prefix, "--vocab_size=300")
    assert bad.returncode == 2 and "--model.vocab_size is 300" in bad.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name files, folders or patterns"),
        (["inspect"], "inspect, verify, merge or split and prefixes"),
        (["x.txt"], "give --out"),
        (["x.txt", "--out=y"], "give --tokenizer"),
        (["inspect", "gone"], "gone.bin is missing"),
        (["x.txt", "--out=y", "--tokenizr=z"], "Did you mean tokenizer?"),
    ],
)
def test_wrong_words_are_one_paragraph(words, said):
    done = tool(*words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_files_that_are_not_there_or_empty_are_named(model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for word, said in ((f"{tmp_path}/none*", "no file fits it as a pattern"), (tmp_path / "empty.txt", "is empty")):
        done = tool(word, f"--tokenizer={model}", f"--out={tmp_path / 'x'}")
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not list(tmp_path.glob("x.bin"))
