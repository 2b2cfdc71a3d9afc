"""How processes are compared during a run: who is slow is named, what a device says is read, and nobody waits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_fn.run import device_state
from llama_fn.run.ranks import Ranks, stragglers

ROOT = Path(__file__).resolve().parents[2]


def row(rank, work=5.0, wait=0.2, **more):
    return {"rank": rank, "host": f"n{rank // 2}", "step_ms": 400.0, "data_wait_ms": wait, "work_ms": work, **more}


def test_processes_that_are_alike_are_none_of_them_slow():
    assert stragglers([row(i, 5.0 + i / 10, i / 2) for i in range(8)]) == {}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (row(5, work=9.0), "rank 5 on n2 is slow: 9.0 ms for a product that takes the others 5.0"),
        (row(5, work=9.0, temperature_c=91.0, power_w=180.2), "takes the others 5.0 (91 °C, 180 W)"),
        (row(5, wait=60.0), "rank 5 on n2 waits 60.0 ms a step for its batch, the others 0.2"),
        (row(5, memory_errors=2.0), "rank 5 on n2 has 2 memory errors that could not be corrected"),
    ],
)
def test_one_that_is_not_is_named_with_what_tells_it_apart(other, said):
    rows = [row(i) for i in range(8) if i != 5] + [other]
    (text,) = stragglers(rows).values()
    assert said in text


def test_what_a_device_says_is_asked_beside_the_steps_and_told_in_the_next_round(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(device_state, "read", lambda device: answer.wait(10) and {"temperature_c": 50.0})
    ranks = Ranks(None, "cpu", 1, tmp_path, 0)
    ranks.done(1, 0.4, 0.0)
    answer.set()
    ranks.state.result()
    ranks.done(2, 0.4, 0.0)
    ranks.close()
    first, second = [json.loads(line)["ranks"][0] for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert "temperature_c" not in first and second["temperature_c"] == 50.0


class Store:
    """Of several processes in one: what a watchdog's store holds."""

    def __init__(self, world):
        self.words, self.world = {}, world

    def of(self, rank):
        def heard(about):
            found = [self.words.get((about, r)) for r in range(self.world)]
            return None if None in found else found

        return SimpleNamespace(rank=rank, watchdog=SimpleNamespace(
            report=lambda about, word: self.words.__setitem__((about, rank), word), heard=heard,
            forget_all=lambda about: [self.words.pop((about, r)) for r in range(self.world)],
        ))  # fmt: skip


def test_a_slow_one_is_warned_of_once_and_again_after_it_was_well(tmp_path, caplog):
    store = Store(3)
    ranks = [Ranks(store.of(r), "cpu", 10, tmp_path if r == 0 else None, 0) for r in range(3)]
    slow_in = {20, 30, 50}
    for each in ranks:
        each.work = lambda: 5.0
    for iteration in range(1, 71):
        for each in ranks:
            if each.processes.rank == 2:
                each.work = (lambda: 50.0) if iteration in slow_in else (lambda: 5.0)
            assert each.done(iteration, 0.4, 0.001) == (iteration % 10 == 0)
    for each in ranks:
        each.close()
    lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [10, 20, 30, 40, 50, 60, 70]
    assert {line["iteration"] for line in lines if line["slow"]} == slow_in
    assert [r["rank"] for r in lines[0]["ranks"]] == [0, 1, 2] and lines[0]["ranks"][1]["step_ms"] == 400.0
    assert [record.message.split(":")[0] for record in caplog.records] == ["iteration 20", "iteration 50"]
    assert not store.words, "what was read is no longer in memory"


def test_nobody_waits_for_one_that_has_not_said_anything(tmp_path):
    store = Store(2)
    chief, other = (Ranks(store.of(r), "cpu", 1, tmp_path if r == 0 else None, 0) for r in range(2))
    for iteration in (1, 2, 3):
        chief.done(iteration, 0.4, 0.0)
    assert (tmp_path / "ranks.jsonl").read_text() == ""
    for iteration in (1, 2, 3):
        other.done(iteration, 0.4, 0.0)
    chief.close()
    assert len((tmp_path / "ranks.jsonl").read_text().splitlines()) == 3


COMMON = """
        NPU ID                         : 3
        Chip Count                     : 1

        Chip ID                        : 0
        HBM Usage Rate(%)              : 4
        Temperature(C)                 : 46
        NPU Real-time Power(W)         : 93.4

        Chip Name                      : mcu
        Temperature(C)                 : 38
"""
ECC = """
        NPU ID                                   : 3
        HBM Single Bit Error Count               : 12
        HBM Double Bit Error Count               : 1
        HBM Double Bit Aggregate Total Err Cnt   : 7
"""


def test_an_npu_says_how_it_is_by_its_tool(tmp_path, monkeypatch):
    (tmp_path / "common").write_text(COMMON)
    (tmp_path / "ecc").write_text(ECC)
    tool = tmp_path / "npu-smi"
    tool.write_text(f'#!/bin/bash\n[ "$5" = 3 ] && cat {tmp_path}/"$3"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool.chmod(0o755)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_state.read("npu") == {"temperature_c": 46.0, "power_w": 93.4, "memory_errors": 1.0}
    tool.write_text("#!/bin/bash\necho no permission\nexit 1\n")
    assert device_state.read("npu") == {}
    tool.unlink()
    assert device_state.read("npu") == {} == device_state.read("cpu")


def test_a_gpu_by_its_library_as_far_as_it_goes(monkeypatch):
    class NVMLError(Exception):
        pass

    def no_ecc(*_):
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda i: i, NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetTemperature=lambda h, k: 50 + h, nvmlDeviceGetPowerUsage=lambda h: 312_500,
        nvmlDeviceGetTotalEccErrors=lambda *a: 0, NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1, NVML_VOLATILE_ECC=0,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert device_state.read("cuda") == {"temperature_c": 52, "power_w": 312.5, "memory_errors": 0}
    nvml.nvmlDeviceGetTotalEccErrors = no_ecc
    assert device_state.read("cuda") == {"temperature_c": 52, "power_w": 312.5}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert device_state.read("cuda") == {}


def test_two_processes_leave_a_line_for_each_round(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    shutil.copy(Path(os.__file__).parent / "argparse.py", corpus)
    flags = [
        "--flagfile=configs/tiny_cpu.flags", "--model.num_layers=1", "--model.embed_dim=16", "--model.num_heads=2",
        "--model.num_kv_heads=2", "--model.mlp_dim=16", "--model.vocab_size=400", "--data.seq_len=32", "--run.steps=12",
        "--run.backend=eager", "--mesh.axes=data:2", "--run.eval_every=0", "--run.tensorboard=false",
        f"--data.path={corpus}", f"--run.workdir={tmp_path / 'run'}", "--run.ranks_every=5",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    done = subprocess.run([*launcher, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "ranks.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [5, 10]
    assert all(each["work_ms"] > 0 and each["step_ms"] > 0 for line in lines for each in line["ranks"])
    assert [each["rank"] for each in lines[0]["ranks"]] == [0, 1]
