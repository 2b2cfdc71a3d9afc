"""Text as it comes: JSON by any name, marks and halves of characters, folders with what does not belong, long lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llama_fn.data import corpus, json_text, prepare, tokenizer
from llama_fn.errors import UserError

DOCUMENTS = ["one of them", "two, of them", "café 世界"]
LINES = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS)


def read(path, key="text"):
    return list(corpus.documents(str(path), key))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES), ("a.ndjson", LINES), ("a.json", LINES), ("A.JSON", LINES), ("a.json", "\n\n" + LINES),
        ("a.json", json.dumps([json.loads(line) for line in LINES.splitlines()])),
        ("a.json", json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1)),
        ("a.jsonl", "\ufeff" + LINES), ("a.json", "\ufeff" + LINES), ("a.jsonl", LINES.replace("\n", "\r\n")),
        ("a.jsonl", LINES.replace("\n", "\n\n \n")), ("a.jsonl", LINES.rstrip()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_folder", [False, True])
def test_json_is_recognised_by_any_name(name, content, in_folder, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read(tmp_path if in_folder else tmp_path / name) == DOCUMENTS


def test_a_single_object_is_a_document_and_source_code_in_a_folder_stays_text(tmp_path):
    (tmp_path / "one.json").write_text('{"text": "whole"}')
    assert read(tmp_path / "one.json") == ["whole"]
    package = '{\n  "name": "x"\n}\n'
    (tmp_path / "package.json").write_text(package)
    (tmp_path / "list.json").write_text("[1, 2]")
    assert sorted(read(tmp_path)) == sorted(["[1, 2]", "whole", package])
    for name, message in (("package.json", r"no text under --data.jsonl_key=text; found \['name'\]"),
                          ("list.json", "element 0 has no text")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


def test_the_files_of_a_folder_are_drawn_so_that_the_last_are_not_the_last_names(tmp_path):
    names = [f"{i:03}.txt" for i in range(100)]
    for name in names:
        (tmp_path / name).write_text(name)
    drawn = read(tmp_path)
    assert sorted(drawn) == names and drawn == read(tmp_path), "all of them, in the same order again"
    behind = [names.index(name) for name in drawn[90:]]
    assert min(behind) < 50 and sum(behind) / 10 < 75, "the names of the last tenth are from everywhere"


@pytest.mark.parametrize(
    "content, message",
    [
        (LINES + '{"text": "caf\xe9"}', ":4 is not UTF-8: byte 13 of it is 0xe9"),
        (LINES + "{oops", ":4 is not JSON"),
        (LINES + "[" * 100_000, ":4 cannot be read as JSON"),
        (LINES + '{"text": 1' + "0" * 5000 + "}", ":4 cannot be read as JSON"),
        (LINES + "7\n", ":4 has no text under"),
        (LINES + '{"text": null}\n', ":4 has no text under"),
        ("\n \n", "holds no text"),
    ],
)
def test_wrong_lines_are_named(content, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content.encode("latin-1", errors="replace"))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.jsonl")


def test_an_array_too_large_to_be_read_at_once_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[" + LINES.replace("\n", ",")[:-1] + "]")
    monkeypatch.setattr(json_text, "WHOLE_BYTES", 10)
    with pytest.raises(UserError, match=r"jq -c '.\[\]' a.json > a.jsonl"):
        read(tmp_path / "a.json")


def test_halves_of_characters_become_replacement_characters_with_a_word(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d, half \\udc00"}\n')
    texts = read(tmp_path / "x.jsonl")
    assert texts == ["whole 😀", "half \ufffd, half \ufffd"] and all(text.encode() for text in texts)
    assert "x.jsonl:2 holds half of a character" in caplog.text and "2 halves" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [("hé".encode("utf-16"), "UTF-16 text"), ("hé".encode("latin-1"), "not UTF-8 text"), (b"\0\1", "binary file")],
)
def test_other_encodings_are_named(content, message, tmp_path):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.txt")


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert read(tmp_path / "x.txt") == ["words"]


def test_what_does_not_belong_into_a_folder_is_passed_over(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("b.txt", "a/a.txt", "empty.py", ".hidden.txt", ".git/config", "run/train.log", "run/flags.txt",
                 "run/data/c.txt", "blank.md", "image.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.py" else " \n" if name == "blank.md" else name)
    (tmp_path / "._binary.txt").write_bytes(b"\0\1")
    (tmp_path / "run" / "run.lock").write_text("{}")
    assert read(tmp_path) == ["a/a.txt", "b.txt"]
    assert "left out, as folders of runs: run" in caplog.text
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "__init__.py").touch()
    with pytest.raises(UserError, match="1 empty ones were passed over"):
        read(tmp_path / "only")


def test_neither_file_nor_folder_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read(tmp_path / "pipe")


def test_another_corpus_is_another_identity(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    first = corpus.identity(str(tmp_path))
    assert corpus.identity(str(tmp_path)) == first
    os.utime(tmp_path / "a.txt", (1, 1))
    second = corpus.identity(str(tmp_path))
    (tmp_path / "a.txt").write_text("other words")
    third = corpus.identity(str(tmp_path))
    (tmp_path / "b.txt").write_text("more")
    assert len({first, second, third, corpus.identity(str(tmp_path)), corpus.identity("")}) == 5


@pytest.mark.parametrize("line", ["x" * 200_000, "世" * 70_000, "word " * 40_000])
def test_a_tokenizer_learns_from_lines_of_any_length(line, tmp_path):
    cut = list(tokenizer._lines([line + "\nshort\n"]))
    assert "".join(cut) == line + "\nshort\n" and max(len(part.encode()) for part in cut) <= 65_536
    tokenizer.train([line, "and a few words of another kind " * 50], 280, tmp_path / "t.model")
    assert tokenizer.load(tmp_path / "t.model").vocab_size() == 280


def test_more_pieces_than_the_corpus_has_are_refused_with_their_number(tmp_path):
    with pytest.raises(UserError, match=r"--model.vocab_size=5000 pieces .*: it has at most \d+"):
        tokenizer.train(["a few words " * 50], 5000, tmp_path / "t.model")


@pytest.mark.parametrize("given", [".", "texts", "texts/", "./texts", "texts/."])
def test_folders_are_folders_whatever_lies_beside_them(given, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts.bin").write_text("unrelated")
    monkeypatch.chdir(tmp_path)
    assert prepare.given_prefix(given) is None
    assert prepare.given_prefix("texts.bin") == tmp_path / "texts"
    assert prepare.given_prefix("nothing") is None


def test_prefixes_are_found_and_two_meanings_are_refused(tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"x{suffix}").touch()
    for given in ("x", "x.bin", "x.idx"):
        assert prepare.given_prefix(str(tmp_path / given)) == tmp_path / "x"
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"is a folder, and x.bin and .idx lie beside it"):
        prepare.given_prefix(str(tmp_path / "x"))
    assert prepare.given_prefix(str(tmp_path / "x.idx")) == tmp_path / "x"
    assert Path(tmp_path).is_dir()
