"""A machine without an NPU is told what it lacks; the environment is defaulted, checked, and documented."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama_fn import compat, config, config_checks, config_fields, launch
from llama_fn.ascend import environment
from llama_fn.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RUN = config.RunConfig(backend="npu")


def test_train_says_precisely_what_is_missing(tmp_path):
    command = [sys.executable, "train.py", "--run.backend=npu", f"--run.workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in (
        "torch_npu: not installed",
        "pip install 'llama_fn[npu]'",
        "CANN: ",
        "set_env.sh",
        "driver: no ",
        "device: no ",
    ):
        assert part in done.stderr, part
    assert "HCCL_CONNECT_TIMEOUT=1200 (default of llama_fn)" in done.stderr


def test_check_npu_answers_without_one():
    done = subprocess.run([sys.executable, "-m", "llama_fn.tools.check_npu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "torch_npu: not installed; missing:" in done.stdout


def test_the_environment_is_defaulted_and_what_is_set_stays():
    environ = {"TASK_QUEUE_ENABLE": "2"}
    lines = environment.set_environment(replace(RUN, deterministic=True), None, environ)
    assert environ["HCCL_CONNECT_TIMEOUT"] == "1200" and environ["TASK_QUEUE_ENABLE"] == "2"
    assert environ["HCCL_EXEC_TIMEOUT"] == "570", "30 below --run.timeout_s"
    assert environ["MAX_COMPILE_CORE_NUMBER"] == str(compat.physical_cores()) and "HCCL_BUFFSIZE" not in environ
    assert "TASK_QUEUE_ENABLE=2" in lines and "HCCL_DETERMINISTIC=true (default of llama_fn)" in lines
    assert "NPU_ASD_ENABLE" not in environ


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"HCCL_CONNECT_TIMEOUT": "3"}, r"HCCL_CONNECT_TIMEOUT=3: expected an integer of 120\.\.7200"),
        ({"HCCL_DETERMINISTIC": "yes"}, "expected false or true or strict"),
        ({"HCCL_OP_EXPANSION_MODE": "AICPU"}, "expected AI_CPU or AIV or HOST or HOST_TS"),
        ({"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_DETERMINISTIC": "true"}, "sums in no fixed order"),
        ({"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_EXEC_TIMEOUT": "1200"}, "waits 1091 seconds at most"),
        ({"MAX_COMPILE_CORE_NUMBER": "0"}, r"expected an integer of 1\.\.1024"),
        ({"HEEL_CONNECT_TIMEOUT": "600"}, r"HEEL_CONNECT_TIMEOUT does nothing\. Did you mean HCCL_CONNECT_TIMEOUT\?"),
    ],
)
def test_a_wrong_environment_is_refused(environ, said):
    with pytest.raises(UserError, match=said):
        environment.set_environment(RUN, None, environ)


def test_collectives_on_vector_cores_take_one_group_inside_of_a_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    aiv = {"HCCL_OP_EXPANSION_MODE": "AIV"}
    environment.check_groups("model:8", {"model": range(8)}, aiv)
    environment.check_groups("data:2,model:8", {"model": range(8), "data": (0, 8)}, {})
    with pytest.raises(UserError, match="on mesh data:2,model:4 this step has 2: data, model"):
        environment.check_groups("data:2,model:4", {"data": (0, 4), "model": range(4)}, aiv)
    with pytest.raises(UserError, match="on mesh data:2,model:8 data joins machines"):
        environment.check_groups("data:2,model:8", {"data": (0, 8)}, aiv)
    environ = dict(aiv)
    environment.set_environment(replace(RUN, timeout_s=7200), None, environ)
    assert environ["HCCL_EXEC_TIMEOUT"] == "1091"


def test_cann_dumps_into_the_folder_that_is_given(tmp_path):
    environ: dict[str, str] = {}
    environment.set_environment(RUN, tmp_path / "rank_2" / "ge", environ)
    assert environ["DUMP_GRAPH_PATH"] == str(tmp_path / "rank_2" / "ge") and environ["DUMP_GE_GRAPH"] == "2"
    environ = {}
    environment.set_environment(RUN, None, environ)
    assert "DUMP_GRAPH_PATH" not in environ


def test_ranks_that_dump_are_those_asked_for():
    run = replace(RUN, dump_dir="x", dump_ranks="0, 2")
    assert [rank for rank in range(4) if config_checks.dumps(run, rank)] == [0, 2]
    assert config_checks.dumps(replace(run, dump_ranks="all"), 1)
    assert not config_checks.dumps(replace(run, dump_dir=""), 0)


def test_local_rank_picks_the_device(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launch.local_device(8) == 3
    with pytest.raises(UserError, match="LOCAL_RANK=3, but this machine shows 2 devices"):
        launch.local_device(2)


def test_the_documented_table_is_the_one_that_is_used():
    page = (ROOT / "docs" / "ascend.md").read_text()
    for v in environment.VARIABLES:
        default = "left alone" if v.default is None else v.default
        assert f"| `{v.name}` | {default} | " in page and f"| {v.meaning} |" in page, v.name


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"run.backend": "npu", "run.device": "cpu"}, "does not go with --run.backend=npu"),
        ({"run.device": "npu"}, "does not go with --run.backend=inductor"),
        ({"run.device": "gpu"}, "expected auto, cpu, cuda or npu"),
        ({"run.backend": "npu", "run.dump_ranks": "first"}, "neither all nor ranks"),
        ({"run.profile_steps": "5"}, "is not FIRST:LAST"),
    ],
)
def test_flags_that_do_not_go_together(values, said):
    with pytest.raises(UserError, match=said):
        config_checks.resolved(config_fields.with_values(config.Config(), values))


def test_the_device_follows_the_backend():
    npu = config_fields.with_values(config.Config(), {"run.backend": "npu"})
    assert (
        config_checks.resolved(npu).run.device == "npu" and config_checks.resolved(config.Config()).run.device == "cpu"
    )
