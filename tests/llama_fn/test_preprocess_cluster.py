"""A corpus shared out over datatrove's tasks: the bytes of one process, here and under SLURM. (Extra `cluster`.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra cluster is missing; runs in make nightly")
from llama_fn.data import tokenizer
from llama_fn.tools.preprocess_cluster import share

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
# Runs each task of an array at once, as SLURM would on some node, and says a number as sbatch does.
SBATCH = """#!/bin/bash
for last; do true; done
cp "$last" "$STAND_IN/script_$(ls "$STAND_IN" | wc -l)"
echo "$@" >> "$STAND_IN/calls"
count=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
export SLURM_JOB_ID=17
for task in $(seq 0 "$count"); do SLURM_ARRAY_TASK_ID=$task bash "$last" >> "$STAND_IN/output" 2>&1; done
echo "Submitted batch job 17"
"""
SRUN = """#!/bin/bash
while [[ "$1" != launch_pickled_pipeline && "$1" != merge_stats ]]; do shift; done
SLURM_NODELIST=here exec "$@"
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder of files, and the tokens that one process makes of them."""
    folder = tmp_path_factory.mktemp("corpus")
    source = Path(json.__file__).parent.parent
    texts = [path.read_text() for path in sorted(source.glob("*.py"))[:23]]
    (folder / "files").mkdir()
    for i, text in enumerate(texts):
        if i % 2:
            (folder / "files" / f"{i:02}.txt").write_text(text)
        else:
            rows = [json.dumps({"text": text[at : at + 900]}) for at in range(0, len(text), 900)]
            (folder / "files" / f"{i:02}.jsonl").write_text("\n".join(rows))
    tokenizer.train(texts, 400, folder / "tokenizer.model")
    assert not preprocess(folder, "plain").returncode
    return folder


def preprocess(folder, out, *flags, **environ):
    words = [str(folder / "files"), f"--tokenizer={folder / 'tokenizer.model'}", f"--out={folder / out}", *flags]
    command = [sys.executable, "-m", "llama_fn.tools.preprocess", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True)


def same(folder, out):
    for end in (".bin", ".idx"):
        assert (folder / f"{out}{end}").read_bytes() == (folder / f"plain{end}").read_bytes(), end
    assert not list((folder / f"{out}.tasks").glob("parts*")), "the parts are joined"


@pytest.mark.parametrize("tasks", [1, 4, 40])
def test_tasks_on_this_machine_make_the_bytes_of_one_process(tasks, given):
    done = preprocess(given, f"local{tasks}", "--executor=local", f"--tasks={tasks}", "--workers=2")
    assert not done.returncode, done.stderr[-3000:]
    same(given, f"local{tasks}")
    again = preprocess(given, f"local{tasks}", "--executor=local", f"--tasks={tasks}")
    assert "are there already" in again.stdout


def test_slurm_gets_an_array_of_tasks_and_a_job_that_joins_them(given, tmp_path):
    stand_in, programs = tmp_path / "stand_in", tmp_path / "bin"
    stand_in.mkdir()
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "#!/bin/bash\necho here\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    flags = ["--executor=slurm", "--tasks=3", "--partition=cpu", "--time=1:00:00", "--sbatch=account=llm"]
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "STAND_IN": str(stand_in)}
    done = preprocess(given, "slurm", *flags, **environ)
    assert not done.returncode, done.stderr[-3000:]
    assert "jobs 17 and 17 of SLURM will make" in done.stdout
    same(given, "slurm")
    tokens, *_ = (path.read_text() for path in sorted(stand_in.glob("script_*")))
    for line in ("--partition=cpu", "--time=1:00:00", "--account=llm", "--array=0-2", "--job-name=slurm_tokens"):
        assert f"#SBATCH {line}\n" in tokens, tokens
    assert "--dependency=afterok:17" in (stand_in / "calls").read_text(), "the joining waits for the tasks"


def test_wrong_words_are_told_before_anything_is_written(given):
    for flags, said in ((["--executor=slurm"], "needs --partition"),
                        (["--executor=slurm", "--partition=x", "--sbatch=account"], "is not KEY=VALUE")):  # fmt: skip
        done = preprocess(given, "wrong", *flags)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_every_file_has_one_task_and_neighbours_stay_together(tmp_path):
    files = []
    for i in range(30):
        files.append(tmp_path / str(i))
        files[-1].write_bytes(b"x" * (i * 37 % 11 * 1000))
    for tasks in (1, 2, 7, 30, 50):
        shares = [share(files, rank, tasks) for rank in range(tasks)]
        assert [*chain(*shares)] == files
    sizes = [sum(file.stat().st_size for file in share(files, rank, 4)) for rank in range(4)]
    assert max(sizes) - min(sizes) <= 2 * 10_000
