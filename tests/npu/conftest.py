"""Steps lowered through the real torchair, once per session, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import standin
from filelock import FileLock
from jobs import JOBS, NIGHTLY


@pytest.fixture(scope="session")
def torch_npu_environment():
    try:
        return standin.environment()
    except standin.Unavailable as reason:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{reason}; runs on Linux where gcc, nm and the torch_npu wheel can be had")


@pytest.fixture(scope="session")
def lowered(tmp_path_factory, torch_npu_environment, request):
    """Job name -> folder with a dump per rank; made once, also where several processes run tests. Those of NIGHTLY only
    where slow tests run too."""
    left_out = NIGHTLY if request.config.getoption("-m") == "not slow" else set()
    names = [name for name in JOBS if name not in left_out]
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ge"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            _work([{**JOBS[name], "out": str(folder / name)} for name in names], torch_npu_environment, folder)
            (folder / "done").touch()
    return {name: folder / name for name in names}


def _work(jobs, environment, folder: Path) -> None:
    """Two processes, as conversion is single-threaded."""
    running = []
    for i in range(2):
        file = folder / f"jobs_{i}.json"
        file.write_text(json.dumps(jobs[i::2]))
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(file)]
        with open(folder / f"log_{i}.txt", "w") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(timeout=600) for process in running]
    if any(codes):
        raise RuntimeError("\n".join((folder / f"log_{i}.txt").read_text()[-4000:] for i, c in enumerate(codes) if c))
