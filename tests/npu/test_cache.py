"""--run.npu_cache: what GE is told, and that processes of a stage and a second start find what was compiled."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--run.backend=npu", "--model.num_layers=2", "--model.embed_dim=128", "--model.num_heads=2",
    "--model.num_kv_heads=2", "--model.mlp_dim=256", "--model.vocab_size=400", "--data.seq_len=32",
]  # fmt: skip


@pytest.fixture
def start(torch_npu_environment, tmp_path):
    def run(n, *flags, **environment):
        """(compiled or loaded, key) of each process."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        worker = [str(Path(__file__).with_name("worker_cache.py")), str(tmp_path / "cache")]
        done = subprocess.run(
            [*command, *worker, *SMALL, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300,
            env={**torch_npu_environment, "CANN_STANDIN_DEVICES": str(n), **environment},
        )  # fmt: skip
        assert not done.returncode, (done.stdout + done.stderr)[-3000:]
        return re.findall(r"GE (\w+) (\S+)", done.stdout) or done.stdout

    return run


@pytest.mark.slow
def test_of_two_ranks_one_compiles_and_the_other_loads(start):
    mesh = "--mesh.axes=data:1,model:2"
    first = start(2, mesh)
    assert sorted(done for done, _ in first) == ["compiled", "loaded"], "the other waited, and loaded"
    (key,) = {key for _, key in first}
    assert re.fullmatch(r"[A-Za-z0-9_\-]{1,128}", key), "what GE takes for a key"


@pytest.mark.slow
def test_a_second_start_with_other_numbers_loads_and_what_the_disk_changed_is_compiled_again(start, tmp_path):
    mesh = "--mesh.axes=data:1,model:2"
    ((_, key), _) = start(2, mesh)
    assert start(2, mesh, "--optim.lr=1e-5", "--run.steps=7") == [("loaded", key)] * 2
    (model,) = (tmp_path / "cache" / key).glob("*.om")
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert sorted(start(2, mesh)) == [("compiled", key), ("loaded", key)]


@pytest.mark.slow
def test_each_stage_of_a_pipeline_compiles_once_for_all_its_ranks(start):
    done = start(4, "--mesh.axes=pipe:2,model:2", "--data.microbatches=2", "--data.global_batch_size=2")
    by_key = {key: sorted(what for what, k in done if k == key) for _, key in done}
    assert list(by_key.values()) == [["compiled", "loaded"]] * 2


@pytest.mark.slow
def test_without_names_of_groups_nothing_is_kept(start):
    said = start(2, "--mesh.axes=data:1,model:2", CANN_STANDIN_NO_NAMES="1")
    assert "error: --run.npu_cache needs a CANN whose HCCL lets process groups be named" in said
