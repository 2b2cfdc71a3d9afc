"""Machines compared before a run: each staged fault is named with its host, and what is alike is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_fn.distributed import preflight
from llama_fn.distributed.preflight import Seen, judge
from llama_fn.errors import SaidElsewhere, UserError
from sharding import Mesh

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
VERSIONS = {"torch": "2.13.0", "llama_fn": "0.1.0", "commit": "abc", "python": "3.11.7", "machine": "Linux-6"}


def machines(hosts=4, per=2):
    """`hosts` machines of `per` devices: axis model inside of them, axis data between."""
    ranks = range(hosts * per)
    return [
        Seen(
            host=f"n{rank // per}", rank=rank, devices=per, wanted=per, device="Ascend910B1", driver="24.1",
            versions=dict(VERSIONS), clock=1000.0, shares=True, free={"/shared": 900 * GB},
            needed={"/shared": 780 * GB},
            rates={"model": 180e9, "data": 22e9},
            groups={
                "model": [r for r in ranks if r // per == rank // per],
                "data": [r for r in ranks if r % per == rank % per],
            },
        )
        for rank in ranks
    ]  # fmt: skip


def changed(host, **what):
    return [replace(each, **what) if each.host == host else each for each in machines()]


def said(told, expected=None):
    return [(each.text, each.wrong) for each in judge(told, expected or {"model": 196e9, "data": 25e9})]


def test_machines_that_are_alike_are_fine():
    assert said(machines()) == []
    assert said([replace(each, clock=each.clock + each.rank / 10) for each in machines()]) == []


@pytest.mark.parametrize(
    ("what", "text", "wrong"),
    [
        ({"devices": 1}, "n2 shows 1 devices, and 2 processes were started on it", True),
        ({"shares": False}, "n2 does not see what rank 0 writes into --run.workdir", True),
        ({"versions": {**VERSIONS, "torch": "2.12.0"}}, "torch: n2 has 2.12.0; the others have 2.13.0", True),
        ({"versions": {**VERSIONS, "commit": "abc-dirty"}}, "commit: n2 has abc-dirty; the others have abc", True),
        ({"versions": {**VERSIONS, "python": "3.11.9"}}, "python: n2 has 3.11.9; the others have 3.11.7", False),
        ({"driver": "23.0"}, "driver: n2 has 23.0; the others have 24.1", False),
        ({"driver": ""}, "driver: n2 has none; the others have 24.1", False),
        ({"device": "Ascend910B4"}, "device: n2 has Ascend910B4; the others have Ascend910B1", False),
        ({"clock": 940.0}, "the clock of n2 is -60 s off", False),
        ({"free": {"/shared": 20 * GB}}, "n2: /shared has 20.0 GB free, and 780.0 will be written", False),
    ],
)
def test_a_machine_that_is_other_is_named(what, text, wrong):
    ((found, is_wrong),) = said(changed("n2", **what))
    assert found.startswith(text) and is_wrong == wrong


def test_a_slow_group_is_named_by_its_hosts_and_ranks():
    slow = changed("n2", rates={"model": 40e9, "data": 22e9})
    assert said(slow) == [("axis model among n2 (ranks 4, 5) sends 40.00 GB/s, the hardware table has 196.00", False)]
    assert said(slow, {"data": 25e9}) == [
        ("axis model among n2 (ranks 4, 5) sends 40.00 GB/s, other groups have 180.00", False)
    ]
    one = [replace(each, rates={**each.rates, "data": 3e9}) if each.rank == 5 else each for each in machines()]
    assert said(one) == [
        ("axis data among n0, n1, n2, n3 (ranks 1, 3, 5, 7) sends 3.00 GB/s, the hardware table has 25.00", False)
    ]


FLAGS = [
    "--flagfile=configs/tiny_cpu.flags", "--model.num_layers=1", "--model.embed_dim=16", "--model.num_heads=2",
    "--model.num_kv_heads=2", "--model.mlp_dim=16", "--model.vocab_size=400", "--data.seq_len=32", "--run.steps=2",
    "--run.backend=eager", "--mesh.axes=data:2", "--run.eval_every=0", "--run.tensorboard=false",
]  # fmt: skip


def run(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir(exist_ok=True)
    shutil.copy(Path(os.__file__).parent / "argparse.py", corpus)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    flags = [*FLAGS, f"--data.path={corpus}", f"--run.workdir={tmp_path / 'run'}"]
    return subprocess.run([*launcher, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_processes_compare_their_machine_and_say_how_fast_it_is(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 machines with 2 processes compared in" in done.stderr and "data " in done.stderr
    assert not list((tmp_path / "run").glob(".preflight_*"))


@pytest.mark.parametrize(
    ("what", "strict", "ends"),
    [({"driver": "23.0"}, False, False), ({"driver": "23.0"}, True, True), ({"shares": False}, False, True)],
)
def test_what_is_wrong_ends_a_run_and_what_is_odd_one_that_is_strict(what, strict, ends, monkeypatch, tmp_path):
    told = changed("n2", **what)
    monkeypatch.setattr(preflight, "seen", lambda *args: told[0])
    chief, other = (
        SimpleNamespace(mesh=Mesh.parse("data:4,model:2"), rank=rank, chief=not rank,
                        words=lambda about, word: [json.dumps(vars(each)) for each in told])
        for rank in (0, 5)
    )  # fmt: skip
    for processes, error in ((chief, UserError), (other, SaidElsewhere)):
        arguments = (processes, "cpu", {}, tmp_path, {}, {}, strict)
        if ends:
            with pytest.raises(error, match=r"the machines of this run were compared:\n  .*n2"):
                preflight.check(*arguments)
        else:
            odd, line = preflight.check(*arguments)
            assert odd == ["driver: n2 has 23.0; the others have 24.1"]
            assert line.startswith("4 machines with 8 processes compared in") and line.endswith("data 22.0 GB/s")
