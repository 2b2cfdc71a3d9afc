"""What came of a run: where its time went over all starts, its summary, and its page."""

from __future__ import annotations

import errno
import html.parser
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from operation_runs import end, spent, staged, start, training

from llama_fn.errors import SaidElsewhere, UserError
from llama_fn.operations import facts, report, summary, svg
from llama_fn.operations.attempts import goodput, read
from llama_fn.run import events, metrics
from llama_fn.signals import Interrupted
from llama_fn.tools import command

ROOT = Path(__file__).resolve().parents[2]
# Two starts: the second begins again at 80 of the 100 iterations that the first, which was killed, did.
TWICE = [
    start(ago=1000), training(ago=900), spent(400, 100, compile=80.0, other=20.0, step=400.0, save=100.0),
    start(ago=300), training(ago=250, iteration=80), {**spent(10, 200, compile=40.0, restore=10.0, step=240.0)},
    {**end(0, "all iterations are done", iteration=200), "time": time.time() - 10},
]  # fmt: skip


def test_every_second_goes_to_one_thing(tmp_path):
    tried = read(staged(tmp_path / "run", TWICE, lock=""))
    found = goodput(tried)
    assert len(tried) == 2 and tried[0].end is None and tried[1].first == 80 and tried[1].iteration == 200
    assert found.wall == pytest.approx(990, abs=1) and sum(found.seconds.values()) == pytest.approx(found.wall)
    assert found.seconds["lost"] == pytest.approx(20 * 4.0), "20 iterations of 4 s came again"
    assert found.seconds["step"] == pytest.approx(640 - 80) and found.ratio == pytest.approx(560 / 990, rel=1e-2)
    assert found.seconds["idle"] == pytest.approx(990 - 600 - 290, abs=1), "from the kill to the second start"
    assert goodput([]).wall == 0


ERRORS = [
    (UserError("a flag is wrong"), 2),
    (SaidElsewhere("another process says it"), 2),
    (MemoryError(), 2),
    (OSError(errno.ENOSPC, "No space left on device"), 2),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "corpus.txt"), 2),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1),
    (RuntimeError("a peer closed its connection"), 1),
    (ValueError("a fault of our own"), 1),
    (KeyboardInterrupt(), 130),
    (Interrupted(signal.SIGTERM), 6),
]


@pytest.mark.parametrize("error, status", ERRORS, ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else x)
def test_an_attempt_leaves_the_status_of_its_process(error, status, tmp_path):
    """By which supervise knows whether another start can mend it."""

    def fn():
        told = events.Events(tmp_path / events.FILE)
        told.write("start", pid=1, host="here", steps=3)
        with told.attempt():
            raise error

    try:
        left = command.status_of(fn)
    except Exception:  # a traceback, with which Python ends
        left = 1
    (attempt,) = read(tmp_path)
    assert left == attempt.end["status"] == status


def test_an_attempt_accounts_for_all_of_its_time(tmp_path):
    told = events.Events(tmp_path / events.FILE)
    began = time.monotonic()
    told.write("start", pid=1, host="here", steps=3)
    with pytest.raises(ValueError), told.attempt():
        with told.phase("compile"):
            time.sleep(0.05)
        with told.phase("step"):
            time.sleep(0.02)
            with told.phase("data"):
                time.sleep(0.04)
            told.done(3)
        raise ValueError("what went wrong")
    took = time.monotonic() - began
    assert sum(told.spent.values()) == pytest.approx(took, abs=0.5), "on a machine that does other things as well"
    for part, seconds in (("compile", 0.05), ("step", 0.02), ("data", 0.04)):
        assert seconds - 1e-3 <= told.spent[part] < seconds + 0.5, part
    (attempt,) = read(tmp_path)
    assert attempt.end["status"] == 1 and attempt.end["why"] == "ValueError: what went wrong"
    assert attempt.iteration == 3 and attempt.spent["data"] == pytest.approx(told.spent["data"], abs=1e-3)
    with open(tmp_path / events.FILE, "a") as file:
        file.write('{"time": 1, "eve')  # killed while it wrote
    assert len(read(tmp_path)) == 1


@pytest.fixture
def run(tmp_path):
    folder = staged(tmp_path / "run", TWICE, lock="")
    rows = [
        {"iteration": i, "lm_loss": 2 + 4 / i, "learning_rate": 1e-4, "tokens_per_second": 100.0,
         "step_time_ms": 4000.0, "consumed_tokens": i * 500, "data_wait_ms": 1.0, "mfu": None, "grad_norm": 1.0}
        for i in range(1, 201)
    ]  # fmt: skip
    rows[99] |= metrics.validation({"wiki": 2.5, "code": 1.5})
    rows[150]["lm_loss"] = math.nan
    (folder / "metrics.jsonl").write_text("".join(metrics.as_json(row) + "\n" for row in rows))
    text = json.dumps(["def ", "<script>alert(1)</script>"])
    (folder / "train.log").write_text(f" sample at iteration 100 | {text}\n sample at iteration 200 | {text}\n")
    (folder / "config.json").write_text(json.dumps({"model.preset": "llama_60m", "optim.lr": 0.5, "optim.b1": 0.9}))
    (folder / "checkpoints" / "200").mkdir(parents=True)
    return folder


def test_a_summary_says_what_came_of_it(run):
    text = summary.write(facts.gather(run))
    assert (run / "summary.md").read_text() == text
    for words in (
        "# run: finished", "200 iterations done, iteration 200 of 1000", "loss, smoothed: 6.0000 at first, 2.0",
        "validation: 2.0000 at iteration 100 (wiki 2.5000, code 1.5000)", "100 tokens/s in a step, 101 over all",
        "in 2 starts: step 56", "lost 8.1%", "checkpoints: 200", "next: `python -m llama_fn.tools.generate",
    ):  # fmt: skip
        assert words in text, (words, text)


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "xlink:href")]
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.open
        while self.open.pop() != tag:
            pass


def test_a_page_holds_everything_and_loads_nothing(run, tmp_path):
    other = staged(tmp_path / "other", [start(), training()], [3.0, 2.5, 2.4])
    text = report.as_html([facts.gather(folder) for folder in (run, other)])
    page = Page()
    page.feed(text)
    assert not page.links and not {"script", "iframe", "img", "link"} & set(page.tags), "nothing from elsewhere"
    assert "&lt;script&gt;alert(1)" in text and "<script" not in text
    for words in ("finished", "optim.lr", "0.5", "lost 8.1%", "status 0: all iterations are done", "Validation of each",
                  "iteration 200</h3>", "no word"):  # fmt: skip
        assert words in text, words
    assert "optim.b1" not in text, "as in the preset"
    assert text.count("<svg") > 8


def test_lines_of_charts_go_through_their_points():
    text = svg.lines({"a": [(0, 1.0), (10, 3.0), (20, math.nan)]})
    (points,) = re.findall(r'points="([^"]+)"', text)
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in points.split())
    assert x0 == pytest.approx(svg.LEFT) and x1 == pytest.approx(svg.WIDTH - svg.RIGHT) and y0 > y1
    assert svg.lines({"a": [(1, math.inf)]}) == "" and svg.lines({"a": []}) == ""
    assert svg.lines({"a": [(1, 5.0)]}).count("<polyline") == 1, "one point alone has axes too"
    ticks = svg._Axis([0.0, 0.93], 0, 100).ticks()
    assert ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert [svg._number(v) for v in (27500, 1.5e-4, 0.25, 12, 3e6)] == ["27,500", "1.5e-4", "0.25", "12", "3e6"]


def test_the_tool_writes_beside_the_run_or_where_it_is_told(run, tmp_path):
    command = [sys.executable, "-m", "llama_fn.tools.report"]
    for words, path in (([], run / "report.html"), ([f"--out={tmp_path / 'x.html'}"], tmp_path / "x.html")):
        done = subprocess.run([*command, str(run), *words], cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode and path.read_text().startswith("<!doctype html>"), done.stderr
    wrong = subprocess.run([*command, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "name a run's work folder" in wrong.stderr
