"""The tools with input that is wrong: status 2 and one paragraph, before any work."""

from __future__ import annotations

import json

import pytest

from tests.forks import outcomes


def filled(tmp_path):
    rows = [{"iteration": i, "lm_loss": 4.0 / i} for i in range(1, 5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    (tmp_path / "null.jsonl").write_text(text + '{"iteration": 5, "lm_loss": null, "nonfinite": {"lm_loss": "nan"}}\n')
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\0\n")
    (tmp_path / "file").write_text("a file")
    for name, content in (("empty", "{}"), ("list", "[]"), ("text", "no JSON"), ("rows", '{"ops": [{}], "flops": {}}')):
        dump = tmp_path / name / "rank_0"
        dump.mkdir(parents=True)
        (dump / "summary.json").write_text(content)
        (dump / "index.html").write_text("")
    return tmp_path


CASES = [
    ("graph_diff empty empty", "empty/rank_0/summary.json is not the summary"),
    ("graph_diff list list", "list/rank_0/summary.json is not the summary"),
    ("graph_diff text text", "text/rank_0/summary.json is not the summary"),
    ("graph_diff rows rows", "rows/rank_0/summary.json is not the summary"),
    ("graph_diff file file", "file holds no summary.json"),
    ("graph_diff gone gone", "gone holds no summary.json"),
    ("graph_diff empty", "give two folders"),
    ("graph_diff --al empty empty", "--al is not a flag"),
    ("compare_loss run run --names=a", "--names=a: give 2 names"),
    ("compare_loss run run --out=file", "file: File exists"),
    ("compare_loss run run --out=file/below", "Not a directory"),
    ("compare_loss run run --bound=nan", "--bound=nan is no bound"),
    ("compare_loss run run --every=0", "--every"),
    ("compare_loss run run --chart", "Did you mean charts?"),
    ("compare_loss run null.jsonl", "lm_loss of iteration 5 is nan"),
    ("compare_loss run binary.jsonl", "line 1 is not a record"),
    ("compare_loss run empty", "metrics.jsonl does not exist"),
    ("compare_loss run", "two runs are compared"),
    ("chart", "name one to 6 work folders"),
    ("chart gone", "gone does not exist"),
    ("chart run --png=file/x.png", "file: File exists"),
    ("chart run --smooth=1", "--smooth"),
    ("plan --json=run", "run: Is a directory"),
    ("plan --json=file/x", "file: File exists"),
    ("plan --json=/proc/none/x", "/proc/none: No such file or directory"),
    ("plan --page=run", "run: Is a directory"),
    ("plan --serch=8", "Did you mean search?"),
    ("plan --search=-1", "search"),
    ("plan --hardware=h101", "Did you mean h100?"),
    ("plan stray", "unexpected argument 'stray'"),
]


@pytest.fixture(scope="module")
def outcome_of(tmp_path_factory):
    """(outcome, files before, files after) by command, each in a folder of its own."""
    folders = {command: filled(tmp_path_factory.mktemp("tool")) for command, _ in CASES}
    before = {command: sorted(folder.rglob("*")) for command, folder in folders.items()}
    words = {command: command.split() for command, _ in CASES}
    commands = [(str(folders[c]), [f"llama_fn.tools.{words[c][0]}", *words[c][1:]]) for c, _ in CASES]
    ended = dict(zip(folders, outcomes(commands), strict=True))
    return {command: (ended[command], before[command], sorted(folders[command].rglob("*"))) for command, _ in CASES}


@pytest.mark.parametrize("command, message", CASES)
def test_wrong_input_is_status_2_and_one_paragraph(command, message, outcome_of):
    out, before, after = outcome_of[command]
    assert out.returncode == 2 and message in out.stderr, (out.returncode, out.stdout, out.stderr)
    assert "Traceback" not in out.stderr and not out.stdout and len(out.stderr) < 600
    assert before == after
