"""Progress: what long work says of itself while it goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llama_fn import progress, tree
from llama_fn.checkpoint import Store
from llama_fn.data import prepare
from llama_fn.model import arrays, random, train_step
from llama_fn.run import compiling
from sharding import Mesh


def said_by(work):
    said = []
    with progress.shown_by(lambda done, what: said.append((done, what))):
        work()
    fractions = [done for done, _ in said]
    assert fractions == sorted(fractions), said
    assert all(0 <= done <= 1 for done in fractions)
    return said


def test_a_span_is_its_part_of_the_whole_and_nothing_is_said_where_nobody_looks():
    def work():
        with progress.span(0.5, 1.0, "outer"), progress.span(0.0, 0.5, "inner"):
            progress.say(1.0, "end")
            progress.say(7.0)

    work()
    assert said_by(work) == [(0.5, "outer"), (0.5, "outer, inner"), (0.75, "outer, inner, end"), (0.75, "outer, inner")]
    assert said_by(lambda: list(progress.tracked([3, 5], str))) == [(0.0, "3"), (0.5, "5")]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiling_says_which_step_and_which_part(backend, tiny_config, tmp_path, nobody_helps):
    cfg = tiny_config()
    cfg = replace(cfg, run=replace(cfg.run, backend=backend, device="cpu", compile_cache=str(tmp_path)))
    said = said_by(lambda: compiling.compile(cfg, Mesh(), None, None, with_eval=True))
    words = "\n".join(what for _, what in said)
    for each in ("the step, tracing, dead_code", "the step, lowering, donation", "the evaluation, tracing"):
        assert each in words, words
    assert ("compiling kernels" in words) == (backend == "inductor")


def test_data_say_how_far_they_are(tiny_config, tmp_path, with_data):
    cfg = with_data(tiny_config(vocab_size=800), path=str(Path(prepare.__file__).parent))
    said = said_by(lambda: prepare.prefixes(cfg, tmp_path / "work"))
    for words, least in (("training a tokenizer, reading", 20), ("merging", 2), ("tokenizing", 20)):
        assert len({done for done, what in said if words in what}) >= least, said


def test_a_state_says_each_leaf(tiny_config, tmp_path, fresh_state):
    cfg = tiny_config()
    infos = train_step.abstract_state(cfg)
    store = Store(infos, tmp_path / "checkpoints", (1, 0))
    store.save(1, fresh_state(cfg), {})
    store.wait()
    found = said_by(store.find)
    assert len(found) > 1
    newest = store.find()
    said = said_by(lambda: store.restore(newest))
    assert "params.embed" in {what for _, what in said}
    store.close()
    assert len(said_by(lambda: arrays.materialize(infos, random.key(0)))) == len(tree.leaves(infos))


def children_of(pid):
    def parent(stat):
        with contextlib.suppress(OSError):
            return int(stat.read_text().rpartition(")")[2].split()[1])

    return [stat.parent for stat in Path("/proc").glob("[0-9]*/stat") if parent(stat) == pid]


def test_an_interruption_ends_a_tokenizers_training_at_once(tmp_path):
    program = f"""
        from llama_fn.data import tokenizer
        import random
        words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(200_000)]
        print("begun", flush=True)
        tokenizer.train(["\\n".join(words)] * 4, 30_000, __import__("pathlib").Path({str(tmp_path / "t.model")!r}))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    until = time.monotonic() + 30
    while not (children := children_of(process.pid)):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # it has begun to train
    process.send_signal(signal.SIGINT)
    process.wait(10)
    assert process.returncode != 0 and not (tmp_path / "t.model").exists()
    assert not children[0].exists()


def test_a_tokenizer_is_trained_in_a_locale_of_ascii_too(tmp_path):
    """Its log quotes pieces, which are no ASCII."""
    texts = tmp_path / "texts.txt"
    texts.write_text(Path(prepare.__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")
    program = (
        "import sys; from pathlib import Path; from llama_fn.data import tokenizer; folder = Path(sys.argv[1]); "
        "tokenizer.train([(folder / 'texts.txt').read_text('utf-8')], 800, folder / 't.model')"
    )
    ascii_only = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=ascii_only, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "t.model").exists(), done.stderr
