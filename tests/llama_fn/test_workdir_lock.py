"""One run in a work folder: the living are respected, the dead and other machines' are told apart."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_fn.errors import UserError
from llama_fn.run import workdir_lock
from llama_fn.run.workdir_lock import WorkdirLock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from llama_fn.run.workdir_lock import WorkdirLock
WorkdirLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def flock(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_living_run_is_named_and_a_killed_one_leaves_nothing(tmp_path, holder):
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on .*, since 20"):
        WorkdirLock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    began = time.monotonic()
    lock = WorkdirLock(tmp_path).acquire()
    assert time.monotonic() - began < 1, "a killed run of this machine is not waited for"
    assert json.loads((tmp_path / workdir_lock.FILE).read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        WorkdirLock(tmp_path).acquire()
    lock.release()
    WorkdirLock(tmp_path).acquire().release()
    assert (tmp_path / workdir_lock.FILE).read_text() == ""


def test_without_locks_of_the_system_the_file_tells(tmp_path, holder, no_locks):
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on"):
        WorkdirLock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    WorkdirLock(tmp_path).acquire().release()


def test_a_process_number_that_is_another_processs_by_now_is_no_owner(tmp_path, no_locks):
    owner = {**workdir_lock._me(), "started": "7"}
    (tmp_path / workdir_lock.FILE).write_text(json.dumps(owner))
    WorkdirLock(tmp_path).acquire().release()


@pytest.mark.parametrize("beats", [True, False])
def test_a_run_on_another_machine_lives_as_long_as_it_gives_signs(beats, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(workdir_lock, "STALE_S", 0.6)
    path = tmp_path / workdir_lock.FILE
    path.write_text(json.dumps({"host": "node7", "boot": "another", "pid": 1, "started": "1", "since": "yesterday"}))
    if beats:
        code = f"import os, time\nfor _ in range(40): time.sleep(0.05); os.utime({str(path)!r})"
        beating = subprocess.Popen([sys.executable, "-c", code])
        with pytest.raises(UserError, match="process 1 on node7, since yesterday"):
            WorkdirLock(tmp_path).acquire()
        beating.kill()
        beating.wait()
    else:
        WorkdirLock(tmp_path).acquire().release()
        assert "the run on node7 has given none" in caplog.text


def test_the_holder_gives_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "BEAT_S", 0.02)
    lock = WorkdirLock(tmp_path).acquire()
    os.utime(lock.path, (1, 1))
    while lock.path.stat().st_mtime == 1:
        time.sleep(0.01)
    lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"pid": "x"}', b'{"pid": 4}'])
def test_a_damaged_file_is_nobodys(content, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "STALE_S", 0.1)
    (tmp_path / workdir_lock.FILE).write_bytes(content)
    WorkdirLock(tmp_path).acquire().release()
