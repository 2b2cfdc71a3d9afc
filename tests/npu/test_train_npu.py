"""torchrun train.py --run.backend=npu with the real torch_npu: everything that comes before device memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_fn.inspect import dump

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--run.backend=npu", "--mesh.axes=data:1,model:2", "--model.num_layers=2", "--model.embed_dim=128",
    "--model.num_heads=2", "--model.num_kv_heads=2", "--model.mlp_dim=256", "--model.vocab_size=400",
    "--data.seq_len=32", "--data.split=8,2,0", "--run.steps=3", "--run.eval_every=2", "--run.dump_ranks=all",
]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_lower_and_dump_over_hccl_groups(tmp_path, torch_npu_environment):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("argparse.py", "ast.py", "bdb.py", "cmd.py", "csv.py", "glob.py"):
        shutil.copy(Path(os.__file__).parent / name, corpus)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [
        *SMALL,
        f"--data.path={corpus}",
        f"--run.workdir={tmp_path / 'work'}",
        f"--run.dump_dir={tmp_path / 'dump'}",
    ]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("worker_train.py")), *flags], cwd=ROOT, capture_output=True, text=True,
        env={**torch_npu_environment, "CANN_STANDIN_DEVICES": "2"}, timeout=300,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert "aclrtMalloc needs a real Ascend NPU" in said, said[-3000:]
    assert "environment: HCCL_CONNECT_TIMEOUT=1200 (default of llama_fn)" in said
    assert said.count("environment: HCCL_CONNECT_TIMEOUT") == 1, "the first process speaks for all"
    assert "get env" not in said and "_get_pg_default_device" not in said
    for rank in (0, 1):
        folder = dump.rank_folder(tmp_path / "dump", rank)
        assert (folder / dump.GE_OWN).is_dir()
        for each in (folder, folder / dump.EVALUATION):
            assert (each / dump.INDEX).exists() and "all_gather" in next(each.glob("*_lowered.txt")).read_text()
            assert (each / dump.GE_GRAPH).stat().st_size > 100_000
            groups = json.loads((each / dump.GE_OPTIONS).read_text())["groups"]
            assert groups == {"llama_fn_model": [0, 1]}, "a name that every rank and start has"
            assert "group=llama_fn_model" in (each / dump.GE_TEXT).read_text()
        first = dump.rank_folder(tmp_path / "dump", 0)
        assert (folder / dump.GE_GRAPH).read_bytes() == (first / dump.GE_GRAPH).read_bytes(), "one for all ranks"


def test_a_process_without_a_device_of_its_own_says_so(tmp_path, torch_npu_environment):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("worker_train.py")), "--run.backend=npu"],
        cwd=ROOT, capture_output=True, text=True, env={**torch_npu_environment, "LOCAL_RANK": "3"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "LOCAL_RANK=3, but this machine shows 1 devices" in done.stderr
