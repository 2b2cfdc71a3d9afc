"""What odd environments end in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from guard_runs import ROOT, flags, train

ENVIRONMENTS = {
    "empty_world_size": ({"WORLD_SIZE": ""}, [], 0, "done: 4"),
    "rank_alone": ({"RANK": "3"}, [], 2, "RANK=3 with WORLD_SIZE 1"),
    "world_size_alone": ({"WORLD_SIZE": "2"}, [], 2, "without RANK, MASTER_ADDR, MASTER_PORT"),
    "world_size_odd": ({"WORLD_SIZE": "two"}, [], 2, "WORLD_SIZE=two: a number"),
    "empty_cache_home": ({"XDG_CACHE_HOME": ""}, ["--run.backend=inductor"], 0, "done: 4"),
    "no_compiler": ({"CXX": "/nonexistent/g++"}, ["--run.backend=inductor"], 2, "/nonexistent/g++ (CXX) cannot be run"),
    "no_compiler_needed": ({"CXX": "/nonexistent/g++"}, [], 0, "done: 4"),
    "home_is_nowhere": ({"HOME": "/nonexistent", "XDG_CACHE_HOME": ""}, [], 0, "done: 4"),
    "one_compile_thread": ({"TORCHINDUCTOR_COMPILE_THREADS": "1"}, ["--run.backend=inductor"], 0, "done: 4"),
    "cache_is_a_file": ({"XDG_CACHE_HOME": "FILE"}, ["--run.backend=inductor"], 0, "compiled code is not kept in"),
}


QUICK = ("rank_alone", "world_size_odd", "no_compiler")  # one of each kind; the rest by `make nightly`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ENVIRONMENTS]
)
def test_environments(name, prefix, tmp_path):
    environ, more, want, message = ENVIRONMENTS[name]
    (tmp_path / "file").touch()
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")} | {
        key: str(tmp_path / "file") if value == "FILE" else value for key, value in environ.items()
    }
    if environ.get("XDG_CACHE_HOME") == "":
        environ |= {"HOME": environ.get("HOME", str(tmp_path / "home"))}
    out = train(*flags(prefix, tmp_path / "run", *more), **environ)
    assert out.returncode == want and message in out.stderr and "Traceback" not in out.stderr, out.stderr
    if want == 2:
        assert not (tmp_path / "run").exists()


def test_a_user_without_a_name_or_a_home_trains(prefix, tmp_path):
    if os.getuid() != 0:
        pytest.skip("the right to become another user is missing; runs as root on Linux")
    script = "import os, sys; os.setgid(54321); os.setuid(54321); os.execv(sys.argv[1], sys.argv[1:])"
    tmp_path.chmod(0o777)
    for folder in (*tmp_path.parents, prefix.parent):
        folder.chmod(folder.stat().st_mode | 0o5) if folder.stat().st_uid == 0 and str(folder) != "/" else None
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")}
    arguments = [sys.executable, "train.py", *flags(prefix, tmp_path / "run", "--run.backend=inductor")]
    probe = [sys.executable, "-c", script, sys.executable, "-c", "import torch"]
    if subprocess.run(probe, cwd=ROOT, env=env, capture_output=True).returncode:
        pytest.skip("the project's environment cannot be read by another user; it can where it does not lie in /root")
    out = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0 and "this user has no home folder" in out.stderr, out.stderr
