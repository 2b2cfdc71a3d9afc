"""The CANN stand-in: what it answers, what it refuses, and what is said where it cannot be made."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import standin

ASK = """
import torch, torch_npu
from torch_npu.npu.utils import _is_gte_cann_version
print(torch.npu.device_count(), torch.npu.get_device_name(0), torch.npu.mem_get_info()[1] // 2**30)
print(_is_gte_cann_version("9.1.0"), _is_gte_cann_version("9.2.0"))
torch.ones(3, device="npu")
"""


def test_one_device_is_answered_and_its_memory_is_refused(torch_npu_environment):
    done = subprocess.run([sys.executable, "-c", ASK], env=torch_npu_environment, capture_output=True, text=True)
    assert "1 Ascend910B1 64" in done.stdout and "True False" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 70 and "aclrtMalloc needs a real Ascend NPU with CANN" in done.stderr


def test_it_comes_from_the_wheels_own_missing_symbols(torch_npu_environment):
    site, libraries = standin.prepare()
    missing = standin.missing_symbols(site)
    assert {"aclrtSetDevice", "aclrtMalloc", "_ZN2ge7Session12CompileGraphEj"} <= set(missing)
    made = standin._symbols(libraries / "libhccl.so", "--defined-only")
    assert set(missing) <= made


def test_a_machine_without_a_c_compiler_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(standin.Unavailable, match="no gcc on the path"):
        standin._build(tmp_path, tmp_path)


def test_a_wheel_that_cannot_be_fetched_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(standin, "VERSION", "0.0.0.never")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(standin.Unavailable, match=r"torch_npu 0\.0\.0\.never cannot be fetched"):
        standin.prepare()
