"""Logs after a resume: the same iterations in both, nothing of an older run lost, no line that stops anything."""

from __future__ import annotations

import json

from llama_fn.run import log_files


def record(i):
    return json.dumps({"iteration": i, "lm_loss": 1.0}) + "\n"


def test_records_after_the_start_come_again_and_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(record, range(1, 9))))
    log_files.keep_records(path, 5)
    assert path.read_text() == "".join(map(record, range(1, 6))) and len(list(tmp_path.iterdir())) == 1


def test_the_last_word_of_a_killed_process_is_dropped_without_a_word(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text(record(1) + record(2) + record(3)[:9])
    log_files.keep_records(path, 2)
    assert path.read_text() == record(1) + record(2) and not caplog.text


def test_lines_that_are_no_records_go_aside_with_a_word(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    odd = [b'\xff\xfe{"it\n', b"[1]\n", b'{"lm_loss": 2}\n', b'{"iteration": "2"}\n', b"[" * 10_000 + b"\n",
           b'{"iteration": 1, "lm_loss": 4.1}\n', b"\n"]  # fmt: skip
    path.write_bytes(record(1).encode() + b"".join(odd) + record(2).encode() + record(3).encode())
    log_files.keep_records(path, 2)
    assert path.read_text() == record(1) + record(2)
    assert (tmp_path / "metrics.rejected.jsonl").read_bytes() == b"".join(odd)
    assert "line 2 is no record of its own iteration; such lines (7)" in caplog.text


def test_lines_of_the_text_log_follow_the_records(tmp_path):
    path = tmp_path / "train.log"
    line = lambda i: f" iteration {i:8d}/      40 | consumed samples: 1 |\n"  # noqa: E731
    note = lambda i: f" validation loss at iteration {i} | lm loss value: 1.0 |\n"  # noqa: E731
    kept = line(1) + line(2) + note(2) + "a note of somebody\n"
    path.write_text(kept + line(3) + line(4) + note(4) + line(5)[:20])
    log_files.keep_lines(path, 2)
    assert path.read_text() == kept


def test_logs_of_an_older_run_get_the_next_number_together(tmp_path):
    paths = [tmp_path / "metrics.jsonl", tmp_path / "train.log"]
    log_files.set_aside(paths)
    assert not list(tmp_path.iterdir())
    for n in (1, 2):
        for path in paths:
            path.write_text(f"run {n}")
        log_files.set_aside(paths)
    paths[1].write_text("run 3")
    (tmp_path / "metrics.jsonl").touch()
    log_files.set_aside(paths)
    names = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert names == {
        "metrics.1.jsonl": "run 1", "train.1.log": "run 1", "metrics.2.jsonl": "run 2", "train.2.log": "run 2",
        "train.3.log": "run 3", "metrics.jsonl": "",
    }  # fmt: skip
