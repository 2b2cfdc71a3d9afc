"""SIGTERM and Ctrl-C before the first step: at once, wherever the preparation is, and nothing is done twice."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llama_fn import signals
from llama_fn.config import Config, RunConfig
from llama_fn.run import stopping

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--model.num_layers=2", "--model.embed_dim=64", "--model.num_heads=2", "--model.num_kv_heads=2",
    "--model.mlp_dim=96", "--data.seq_len=32", "--run.steps=2", "--run.eval_every=0", "--run.tensorboard=false",
]  # fmt: skip


class Started:
    """train.py, and the lines that it prints as they come."""

    def __init__(self, *flags):
        self.process = subprocess.Popen(
            [sys.executable, "train.py", *FLAGS, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def until(self, text):
        self.until_true(lambda: any(text in line for line in self.lines))

    def until_true(self, condition):
        end = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, "".join(self.lines)
            time.sleep(0.01)

    def stop(self, number):
        """Seconds until it has ended, and its status."""
        began = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(60)
        self.reader.join(5)
        return time.monotonic() - began, status


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text that takes some seconds to tokenize."""
    folder = tmp_path_factory.mktemp("corpus")
    source = b"".join(p.read_bytes() for p in sorted(Path(subprocess.__file__).parent.glob("*.py"))[:100])
    for i in range(5):
        (folder / f"{i:02}.txt").write_bytes(source)
    return folder


@pytest.mark.slow
def test_data_and_compiling_are_left_at_once_and_tokenizing_goes_on(corpus, tmp_path):
    flags = [f"--data.path={corpus}", f"--run.workdir={tmp_path}", f"--run.compile_cache={tmp_path / 'code'}"]
    flags += ["--model.vocab_size=8000"]
    for text, number in (
        ("tokenizer: training", signal.SIGTERM),
        ("tokenizing", signal.SIGINT),
        ("compiling with inductor", signal.SIGUSR2),
    ):
        run = Started(*flags)
        run.until(text)
        if text == "tokenizing":
            run.until_true(lambda: any(p.stat().st_size for p in (tmp_path / "data").glob(".*.bin.partial")))
        time.sleep(0.5)
        seconds, got = run.stop(number)
        said = "".join(run.lines)
        assert got == 6 and seconds < 12, (text, seconds, said)
        assert f"{signal.Signals(number).name}: stopped before the first step; nothing to save" in said
        assert "Traceback" not in said, said
        assert (tmp_path / "run.lock").read_text() == "", "the folder is free"
        if text == "compiling with inductor":
            assert int(re.search(r"(\d+) documents were done before", said)[1]) > 0
            assert len(list((tmp_path / "data").glob("*.bin"))) == 1
    run = Started(*flags, "--run.backend=eager")
    assert run.process.wait(120) == 0, "".join(run.lines)


def test_signals_are_named():
    assert signals.named("SIGTERM, SIGUSR1") == [signal.SIGTERM, signal.SIGUSR1] and signals.named("") == []
    for wrong in ("SIGKILL", "TERM", "SIG_IGN", "SIGNONE"):
        with pytest.raises(ValueError, match=f"{wrong} is no signal that a program can handle"):
            signals.named(f"SIGTERM,{wrong}")


GRACES = [(1, "and the run is killed 1 s after a signal"), (0, "about"), (10**6, "about")]


@pytest.mark.parametrize(("grace", "said"), GRACES)
def test_a_save_that_takes_longer_than_the_grace_is_told(grace, said, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stopping, "_rate", lambda folder, size: 1e6)
    cfg = Config(run=RunConfig(grace_s=grace))
    with caplog.at_level("INFO"):
        stopping.say_how_long_a_save_takes(cfg, tmp_path, 60_000_000, True)
    assert "60.0 MB from each process: about 60 s at 1 MB/s" in caplog.text and said in caplog.text
    assert ("killed" in caplog.text) == (grace == 1)


def test_what_a_disk_writes_is_measured_and_nothing_stays(tmp_path):
    assert stopping._rate(tmp_path, 3 << 20) > 0 and not list(tmp_path.iterdir())
