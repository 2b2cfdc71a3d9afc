"""Processes under torchrun give the single process's numbers, resume on another mesh, and name who is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llama_fn import tree
from llama_fn.distributed.processes import Processes
from llama_fn.model import arrays, random, train_step
from llama_fn.run.workdir_lock import WorkdirLock
from sharding import Mesh, P
from sharding.simulate import part

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--flagfile=configs/tiny_cpu.flags", "--model.num_layers=2", "--model.embed_dim=32", "--model.num_heads=2",
    "--model.num_kv_heads=2", "--model.mlp_dim=48", "--model.vocab_size=400", "--data.seq_len=32", "--data.split=8,2,0",
    "--data.microbatches=6", "--data.global_batch_size=12", "--run.steps=12", "--run.checkpoint_every=5",
    "--run.eval_every=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("argparse.py", "ast.py", "bdb.py", "cmd.py", "csv.py", "glob.py"):
        shutil.copy(Path(os.__file__).parent / name, folder)
    return folder


def command(processes, *flags, script="train.py"):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, script, *flags]


def train(processes, workdir, corpus, *flags):
    every = [*SMALL, f"--data.path={corpus}", f"--run.workdir={workdir}", *flags]
    done = subprocess.run(command(processes, *every), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return numbers(workdir)


def numbers(workdir):
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    return torch.tensor([[row["lm_loss"], row["grad_norm"]] for row in rows], dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    return train(1, tmp_path_factory.mktemp("alone"), corpus, "--run.backend=eager")


@pytest.mark.parametrize(
    ("mesh", "rules", "backend"),
    [
        pytest.param("data:2", "fsdp", "inductor --optim.reduce_per_microbatch", marks=pytest.mark.slow),
        pytest.param("model:2", "tp_sp", "inductor", marks=pytest.mark.slow),
        ("model:2", "tp_sp", "eager"),
        pytest.param("data:2,model:2", "fsdp_tp", "eager", marks=pytest.mark.slow),
        pytest.param("pipe:2", "fsdp_tp", "eager", marks=pytest.mark.slow),
        pytest.param("pipe:2", "fsdp_tp", "inductor", marks=pytest.mark.slow),
        pytest.param("pipe:2,data:2", "fsdp", "eager --mesh.schedule=zb_h1", marks=pytest.mark.slow),
    ],
)
def test_processes_give_the_numbers_of_one(mesh, rules, backend, corpus, alone, tmp_path, compile_cache):
    n = Mesh.parse(mesh).size
    flags = [f"--mesh.axes={mesh}", f"--mesh.rules={rules}", *f"--run.backend={backend}".split()]
    flags += [] if "pipe" in mesh else ["--run.sample_every=6"]
    got = train(n, tmp_path / "run", corpus, *flags, f"--run.compile_cache={compile_cache}")
    torch.testing.assert_close(got, alone, rtol=1e-6, atol=0)
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count(" sample at iteration 12 | [") == (0 if "pipe" in mesh else 3)
    # The same run from the checkpoint of iteration 10, on one device.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    resumed = train(1, tmp_path / "run", corpus, "--run.backend=eager", "--run.accept_changes")
    assert torch.equal(resumed[:10], got[:10])
    torch.testing.assert_close(resumed, alone, rtol=1e-6, atol=0)


def test_processes_take_up_steps_that_were_kept(corpus, tmp_path):
    flags = ["--mesh.axes=data:2", "--run.backend=inductor", f"--run.compile_cache={tmp_path / 'code'}"]
    found, said = [], []
    for name in ("first", "second"):
        every = [*SMALL, f"--data.path={corpus}", f"--run.workdir={tmp_path / name}", *flags]
        done = subprocess.run(command(2, *every), cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(numbers(tmp_path / name))
        said.append(done.stderr)
    assert torch.equal(*found)
    assert "step: traced in" in said[0] and "step: compiled in" in said[0]
    assert "traced in" not in said[1] and "step: loaded in" in said[1] and "evaluation: loaded in" in said[1]
    assert len(list((tmp_path / "code").rglob("steps/*.json"))) == 4, "two steps of each process, whose groups differ"


@pytest.mark.parametrize(
    ("processes", "rules"),
    [(2, ["fsdp_tp_ulysses@context:2@2"]), (2, []), (4, [])],
)
@pytest.mark.slow
def test_compiled_steps_of_processes_equal_the_step_of_one(processes, rules, compile_cache):
    """Loss, norm and parameters after five steps in float64 and float32, for every preset and mesh."""
    worker = command(processes, str(compile_cache), *rules, script=str(ROOT / "tests/multirank/worker_steps.py"))
    done = subprocess.run(worker, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "equal" in done.stdout


@pytest.mark.slow
def test_processes_that_do_not_match_the_mesh_are_refused(corpus, tmp_path):
    flags = [*SMALL, f"--data.path={corpus}", f"--run.workdir={tmp_path}", "--mesh.axes=data:4"]
    done = subprocess.run(command(2, *flags), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and "torchrun started 2 processes, but --mesh.axes=data:4 has 4 devices" in done.stderr


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all_of_them_and_is_said_once(corpus, tmp_path):
    """Here that another run has the work folder, which the first process alone looks at."""
    flags = [*SMALL, f"--data.path={corpus}", f"--run.workdir={tmp_path}", "--mesh.axes=data:2", "--run.backend=eager"]
    lock, began = WorkdirLock(tmp_path).acquire(), time.monotonic()
    done = subprocess.run(command(2, *flags), cwd=ROOT, capture_output=True, text=True, timeout=200)
    lock.release()
    assert done.returncode and done.stderr.count("is in use by process") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr and "llama_fn/" not in done.stderr.split("error: ")[0]
    assert time.monotonic() - began < 60, "the other process does not wait for it"


@pytest.mark.parametrize("rank", range(4))
def test_parameters_are_born_in_parts_bitwise_the_same(rank, tiny_config):
    cfg, mesh = tiny_config(), Mesh.parse("data:2,model:2")
    infos = train_step.abstract_state(cfg).params
    layouts = [P.of([()] * (len(i.shape) - 1) + [("model", "data")]) for i in tree.leaves(infos)]
    whole = arrays.materialize(infos, random.key(3))
    parts = Processes(mesh, rank, watchdog=None, backend="gloo").parts(infos, layouts)
    mine = arrays.materialize(infos, random.key(3), parts=parts)
    for a, b, layout in zip(tree.leaves(mine), tree.leaves(whole), layouts, strict=True):
        assert torch.equal(a, part(b, layout, mesh, rank))


def _rank(pid, rank):
    try:
        return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


@pytest.mark.slow  # torchrun waits half a minute for a stopped process to end
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="/proc is missing, where the test finds a rank; runs on Linux"
)
def test_a_rank_that_stands_still_is_named(corpus, tmp_path):
    flags = [*SMALL, f"--data.path={corpus}", f"--run.workdir={tmp_path}", "--mesh.axes=data:2", "--run.backend=eager"]
    flags += ["--run.steps=100000", "--run.eval_every=0", "--run.timeout_s=6"]
    run = subprocess.Popen(command(2, *flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "checkpoints" / "10").is_dir():
        assert run.poll() is None
        time.sleep(0.1)
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _rank(p.name, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    out, _ = run.communicate(timeout=120)
    assert run.returncode and "rank 0 gives up: rank 1 on" in out
    (report,) = (tmp_path / "stuck").glob("rank_0_*.txt")
    said = report.read_text()
    assert re.search(r"gloo:\w+ \d+ of [\dx]+ \w+, group .*: \w+", said) and "Thread 0x" in said, said


@pytest.mark.slow
def test_quick_steps_for_longer_than_the_timeout_are_no_hang(corpus, tmp_path):
    """Words of the watchdog come every few seconds, in which many steps pass: each rank sees the other behind."""
    flags = [*SMALL, f"--data.path={corpus}", f"--run.workdir={tmp_path}", "--mesh.axes=data:2", "--run.backend=eager"]
    flags += [
        "--data.microbatches=1",
        "--run.steps=600",
        "--run.checkpoint_every=600",
        "--run.eval_every=0",
        "--run.timeout_s=2",
    ]
    done = subprocess.run(command(2, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 600 and sum(row["step_time_ms"] for row in rows) > 3 * 2000, "longer than the timeout"


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [100, pytest.param(8000, marks=pytest.mark.slow)])
def test_collectives_under_way_at_once_have_their_results_and_leave_memory_whole(rounds):
    worker = command(2, str(rounds), script="tests/multirank/worker_collectives.py")
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
