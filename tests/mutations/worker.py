"""Damages small input files at random, uses them as a run does, and prints a line for each damage that was not met.

    python tests/mutations/worker.py FOLDER FIRST COUNT

Mutation i is the same in every run. What may happen: a UserError, or the same data as before. For a bare Megatron pair
token values may differ too, as no redundancy shows them; for a text file the text, and for a tokenizer of the user's
own the pieces, since a changed letter is a letter. For files with checksums nothing may; gzip and xz have some.
"""

from __future__ import annotations

import base64
import faulthandler
import gzip
import lzma
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import tokenizers
import zstandard
from pyarrow import csv, parquet

from llama_fn.config import Config, DataConfig, ModelConfig, RunConfig
from llama_fn.data import corpus, indexed, tokenizer, writer
from llama_fn.data.parts import open_parts
from llama_fn.data.samples import Samples
from llama_fn.errors import UserError

FILES = {
    "idx": "x.idx", "bin": "x.bin", "summed_idx": "x.idx", "summed_bin": "x.bin", "sums": "x.sums.json",
    "jsonl": "t.jsonl", "json": "t.json", "tokenizer": "t.model", "own_tokenizer": "t.model",
    "gz": "g.jsonl.gz", "xz": "g.jsonl.xz", "zst": "g.jsonl.zst", "csv": "t.csv", "parquet": "t.parquet",
    "arrow": "t.arrow", "stream": "s.arrow", "tokenizer_json": "h.json", "tiktoken": "k.model",
}  # fmt: skip
KINDS = tuple(FILES)
EXACT = ("gz", "xz")  # texts with sums
VOCAB, HANG_S = 400, 10


def prepared(folder: Path) -> None:
    """The good files, once."""
    if (folder / "good").exists():
        return
    good = folder / "good.making"
    good.mkdir(parents=True)
    random = np.random.default_rng(1)
    lengths = [int(n) for n in random.integers(0, 30, 40)]
    writer.write(good / "x", [random.integers(0, VOCAB, n) for n in lengths], np.uint16)
    text = "".join(
        f'{{"text": "line {i}: caf\\u00e9, \\ud83d\\ude00 and a number {i * i}", "id": {i}}}\n' for i in range(30)
    )
    (good / "t.jsonl").write_text(text)
    (good / "t.json").write_text("[" + ",\n".join(text.splitlines()) + "]")
    words = [" ".join(random.choice(list("abcdefghij"), 5)).replace(" ", "") + f" number {i} " for i in range(2000)]
    tokenizer.train(words, VOCAB, good / "t.model")
    packed(good, text.encode())
    tables(good, [f'line {i}, "quoted" and caf\u00e9' for i in range(3000)])
    vocabularies(good, words)
    good.rename(folder / "good")


def packed(good: Path, text: bytes) -> None:
    (good / "g.jsonl.gz").write_bytes(gzip.compress(text))
    (good / "g.jsonl.xz").write_bytes(lzma.compress(text))
    (good / "g.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(text))


def tables(good: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts, "id": list(range(len(texts)))})
    csv.write_csv(table, good / "t.csv")
    parquet.write_table(table, good / "t.parquet")
    for name, new in (("t.arrow", pa.ipc.new_file), ("s.arrow", pa.ipc.new_stream)):
        with new(str(good / name), table.schema) as out:
            out.write_table(table, 1000)


def vocabularies(good: Path, words: list[str]) -> None:
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(words, VOCAB - 10, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.save(str(good / "h.json"))
    ranks = [bytes([i]) for i in range(256)] + [f"{a}{b}".encode() for a in "abcd" for b in "efgh"]
    (good / "k.model").write_text("".join(f"{base64.b64encode(x).decode()} {i}\n" for i, x in enumerate(ranks)))


def use_pair(folder: Path):
    """Everything that a run asks of a dataset."""
    data = indexed.IndexedDataset(folder / "x")
    data.verify(VOCAB, folder / "verified.json")
    samples = Samples(data, (0, len(data)), 8, 40, 1, "train")
    return [samples[k] for k in range(40)], data.lengths.tolist()


def use_text(path: Path):
    return list(corpus.documents(str(path), "text"))


def use_vocabulary(path: Path):
    pieces = tokenizer.load(path)
    return pieces.decode(list(pieces.encode("some words, caf\u00e9 and number 17 abcdef")))


def use_tokenizer(folder: Path):
    (folder / "t.txt").write_text("some words to learn from, and other ones\n" * 20)
    cfg = Config(
        model=ModelConfig(vocab_size=VOCAB),
        data=DataConfig(path=str(folder / "t.txt"), tokenizer=str(folder / "t.model"), seq_len=8, split="1"),
        run=RunConfig(steps=2, eval_every=0),
    )
    data = open_parts(cfg, folder / "work").data
    return data.tokens.tolist()


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """One to three changes: bits flipped, bytes set, cut out, doubled, or put in; or the file cut short."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        at, n = int(random.integers(0, max(1, len(data)))), int(random.integers(1, 9))
        noise = random.bytes(n)
        match int(random.integers(0, 6)):
            case 0 if data:
                data[at % len(data)] ^= 1 << int(random.integers(0, 8))
            case 1:
                data[at : at + n] = noise
            case 2:
                del data[at : at + n]
            case 3:
                data[at:at] = data[at : at + n]
            case 4:
                data[at:at] = noise
            case _:
                data[at : at + n] = bytes(n) if random.integers(0, 2) else b"\xff" * n
    return bytes(data[: int(random.integers(0, len(data) + 1))] if random.integers(0, 12) == 0 else data)


def mutate(i: int, folder: Path) -> str:
    """ "" or what was wrong."""
    random = np.random.default_rng(i)
    kind, work = KINDS[i % len(KINDS)], folder / f"m{i}"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / "good", work)
    name = FILES[kind]
    if kind in ("idx", "bin"):
        (work / "x.sums.json").unlink()
    if kind == "tokenizer":
        (work / "t.model.sums.json").unlink()
    content = (work / name).read_bytes()
    (work / name).write_bytes(damaged(content, random))
    if kind in ("tokenizer_json", "tiktoken"):
        use = lambda d: use_vocabulary(d / name)  # noqa: E731
    elif "tokenizer" in kind:
        use = use_tokenizer
    else:
        use = use_pair if name.startswith("x") else lambda d: use_text(d / name)
    began = time.monotonic()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        got = use(work)
    except UserError as error:
        text = str(error)
        return "" if text and len(text) < 900 else f"{kind}: an error of {len(text)} characters"
    except Exception as error:
        return f"{kind}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(work, ignore_errors=True)
    if time.monotonic() - began > HANG_S / 2:
        return f"{kind}: took {time.monotonic() - began:.1f} s"
    return _unlike(kind, got, folder, use)


def _unlike(kind: str, got, folder: Path, use) -> str:
    exact = kind in EXACT or FILES[kind].startswith("x") or kind == "own_tokenizer"
    if not exact:
        return ""
    want = use(folder / "good")
    if kind in EXACT:
        return "" if got == want else f"{kind}: other texts than were packed"
    if kind == "own_tokenizer":
        return "" if got == want else "own_tokenizer: other tokens than before"
    if got[1] != want[1]:
        return f"{kind}: other lengths than were written"
    same = all(np.array_equal(a, b) for a, b in zip(got[0], want[0], strict=True))
    return "" if same or kind == "bin" else f"{kind}: other tokens than were written"


def main() -> None:
    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    prepared(folder)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(first, first + count):
        print("at", i, flush=True)
        wrong = mutate(i, folder)
        if wrong:
            print("WRONG", i, wrong, flush=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) / 2**20
    if grown > 1:
        print(f"WRONG memory: {grown:.2f} GiB more than before", flush=True)
    print("done", count, flush=True)


if __name__ == "__main__":
    main()
