"""tokenizer.json and Llama 3's tiktoken file: the ids of transformers and of plain byte-pair merging."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import regex
import tokenizers
from test_mixture import config

from llama_fn.data import prepare, tokenizer
from llama_fn.data.parts import open_parts
from llama_fn.data.vocabularies import LLAMA3_PATTERN, HuggingFaceTokenizer, TiktokenTokenizer, tiktoken_ranks
from llama_fn.errors import UserError

TEXTS = [
    "def main():\n    return 12345 + x\n", "Wörter, 字 and 🙂; they're\t\ttabs\r\n",
    " <|end_of_text|> is text </s> here", "", "a" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    return Path(json.__file__).read_text() * 3 + "".join(TEXTS)


@pytest.fixture(scope="module")
def hf(tmp_path_factory, corpus):
    """As Llama 3 and Qwen have them: byte-level BPE, two special tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([corpus], trainer)
    folder = tmp_path_factory.mktemp("hf")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]})
    )
    return folder / "tokenizer.json"


def test_ids_are_those_of_transformers_but_for_special_tokens_in_text(hf, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    code = """
import json, sys
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(open(sys.argv[2]))
ids = [t(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
print(json.dumps([ids, t.bos_token_id, t.eos_token_id, len(t)]))
"""
    command = [sys.executable, "-c", code, str(hf.parent), str(tmp_path / "texts.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    ids, bos, eos, size = json.loads(done.stdout)
    loaded = tokenizer.load(hf)
    assert isinstance(loaded, HuggingFaceTokenizer)
    assert tokenizer.encode_all(loaded, TEXTS) == ids and [loaded.encode(text) for text in TEXTS] == ids
    assert (loaded.bos_id(), loaded.eos_id(), loaded.vocab_size()) == (bos, eos, size)
    assert [loaded.decode(each) for each in ids] == TEXTS
    assert loaded.eos_id() not in ids[2]


def merged(piece, ranks):
    """Byte-pair merging as it is defined: the pair of lowest rank first."""
    parts = [bytes([b]) for b in piece]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory, corpus):
    ranks = {bytes([b]): b for b in range(256)}
    for word in regex.findall(LLAMA3_PATTERN, corpus)[:4000]:
        ids = merged(word.encode(), ranks)
        names = {rank: token for token, rank in ranks.items()}
        if len(ids) > 1 and names[ids[0]] + names[ids[1]] not in ranks:
            ranks[names[ids[0]] + names[ids[1]]] = len(ranks)
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def test_a_tiktoken_file_merges_bytes_as_defined(tiktoken_file):
    loaded, ranks = tokenizer.load(tiktoken_file), tiktoken_ranks(tiktoken_file.read_bytes())
    assert isinstance(loaded, TiktokenTokenizer) and len(ranks) > 500
    want = [[i for word in regex.findall(LLAMA3_PATTERN, text) for i in merged(word.encode(), ranks)] for text in TEXTS]
    assert tokenizer.encode_all(loaded, TEXTS) == want and [loaded.encode(text) for text in TEXTS] == want
    assert [loaded.decode(each) for each in want] == TEXTS
    assert (loaded.bos_id(), loaded.eos_id(), loaded.vocab_size()) == (len(ranks), len(ranks) + 1, len(ranks) + 256)


def test_a_corpus_is_tokenized_with_either(hf, tiktoken_file, tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0] * 50)
    for path in (hf, tiktoken_file):
        loaded = tokenizer.load(path)
        cfg = config(str(tmp_path / "a.txt"), tmp_path, tokenizer=str(path))
        cfg = replace(cfg, model=replace(cfg.model, vocab_size=loaded.vocab_size()))
        data = open_parts(cfg, tmp_path / path.suffix).data
        assert data.read(0, 0, 10**6).tolist() == [*loaded.encode(TEXTS[0] * 50), loaded.eos_id()]
        assert prepare.tokenizer_of(cfg, tmp_path).vocab_size() == loaded.vocab_size()


def test_what_is_no_tokenizer_is_refused(tmp_path):
    for content, said in (
        (b'{"model": 3}', "is no tokenizer.json"), (b"\0\1\2", "is not a sentencepiece model"),
        (b"YQ== 0\nYQ== 1\n" * 200, "is not a sentencepiece model"), (b"", "sentencepiece model"),
    ):  # fmt: skip
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(UserError, match=said):
            tokenizer.load(tmp_path / "t")
    with pytest.raises(UserError, match="no such file"):
        tokenizer.load(tmp_path / "gone")
