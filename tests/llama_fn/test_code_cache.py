"""The folder of compiled code: damage heals, and a folder that cannot be used costs a word and no crash."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_fn.compiler.backends import code_cache
from llama_fn.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import logging, sys, torch
from pathlib import Path
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from llama_fn.compiler import stages
compiled = stages.jit(lambda x: (x * 2).sum() + torch.ones(3)).trace(torch.ones(3)).lower().compile(
    "inductor", cache=Path(sys.argv[1]))
print(compiled.from_cache, compiled(torch.ones(3)).tolist())
"""


def step(folder, *wrapped, **environ):
    command = [*wrapped, sys.executable, "-c", STEP, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environ}, timeout=120)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    assert step(folder).stdout == "False [7.0, 7.0, 7.0]\n"
    again = step(folder)
    assert again.stdout == "True [7.0, 7.0, 7.0]\n" and not again.stderr, "found, and nothing to heal"
    return folder


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_to_is_refused(mode, tmp_path):
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match=f"other users may write to it.*chmod go-w {tmp_path}"):
        code_cache.usable(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="the right to give a file away is missing; runs as root on Linux")
def test_files_of_another_user_are_refused(tmp_path):
    with code_cache.opened(tmp_path):
        (tmp_path / "code.so").write_bytes(b"code")
    os.chown(tmp_path / "code.so", 12345, -1)
    with (
        pytest.raises(UserError, match=r"code.so: it belongs to user 12345, and this is 0"),
        code_cache.opened(tmp_path),
    ):
        pass
    os.chown(tmp_path / "code.so", 0, -1)
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(UserError, match="belongs to user 12345"):
        code_cache.usable(tmp_path)


def test_what_is_kept_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        with code_cache.opened(tmp_path / "machine" / "version"):
            (tmp_path / "machine" / "version" / "code.so").write_bytes(b"code")
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.name != "machine"]
    assert made and not [path for path in made if path.stat().st_mode & 0o077]


HARMS = {
    "truncate": lambda good: good[: len(good) // 2],
    "flip": lambda good: good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :],
    "empty": lambda good: b"",
    "extend": lambda good: good + b"\0",
    "remove": None,
}


def test_what_is_compiled_in_the_place_of_what_was_damaged_is_left_alone(tmp_path):
    """By a process that comes later, while another still compiles."""
    with code_cache.opened(tmp_path):
        (tmp_path / "code.so").write_bytes(b"code")
    (tmp_path / "code.so").write_bytes(b"harm")
    assert code_cache.heal(tmp_path, unlisted=False) == [tmp_path / "code.so"]
    (tmp_path / "code.so").write_bytes(b"other code")
    assert code_cache.heal(tmp_path, unlisted=False) == [] and (tmp_path / "code.so").exists()


def test_what_another_process_is_writing_is_listed_only_once_it_is_whole(tmp_path):
    """A sum of half a file would make good of what its writer, killed, leaves behind."""
    writing, other = code_cache.opened(tmp_path), code_cache.opened(tmp_path)
    writing.__enter__()
    (tmp_path / "code.so").write_bytes(b"half")
    with other:
        (tmp_path / "other.so").write_bytes(b"other")
    assert not code_cache._listed(tmp_path)
    (tmp_path / "code.so").write_bytes(b"half and half")
    writing.__exit__(None, None, None)
    sums = {name: code_cache.checksum(tmp_path / name) for name in ("code.so", "other.so")}
    assert code_cache._listed(tmp_path) == {name: list(each) for name, each in sums.items()}


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_whatever_file_is_damaged_is_removed_and_compiled_again(harm, filled):
    folders = [next(folder.iterdir()) for folder in filled.iterdir()]
    listed = [path for folder in folders for path in sorted(code_cache._files(folder).values())]
    change, damaged = HARMS[harm], 0
    for victim in [*listed, *(folder / code_cache.FILES for folder in folders)]:
        good = victim.read_bytes() if victim.exists() else b""  # removed, with the list or with another's
        if not good or (change and change(good) == good):
            continue
        damaged += 1
        if change:
            victim.write_bytes(change(good))
        else:
            victim.unlink()
        healed = step(filled)
        assert healed.stdout.endswith("[7.0, 7.0, 7.0]\n"), (victim, healed.stderr)
        said = victim in listed and change is not None
        assert len(healed.stderr.splitlines()) == said, healed.stderr
        assert not said or ("compiled code was damaged" in healed.stderr and str(victim) in healed.stderr)
    after = step(filled)
    assert damaged > 3 and after.stdout == "True [7.0, 7.0, 7.0]\n" and not after.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_compilation_that_is_killed_stops_no_later_one(seed, tmp_path):
    chance = random.Random(seed)
    command = [sys.executable, "-c", STEP, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not list(tmp_path.iterdir()) and process.poll() is None:  # it begins to compile
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 4))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    after = step(tmp_path)
    assert after.stdout.endswith("[7.0, 7.0, 7.0]\n") and not after.stderr, after.stderr
    assert step(tmp_path).stdout == "True [7.0, 7.0, 7.0]\n"


@pytest.mark.slow
def test_what_a_killed_compilation_left_is_removed_when_nobody_compiles(filled):
    (inside,) = (p for folder in filled.iterdir() for p in folder.iterdir())
    left = inside / "ab" / "half.so"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"\x7fELF")
    code_cache.heal(inside, unlisted=False)
    assert left.exists()
    with code_cache.opened(inside):
        assert not left.exists()
    (inside / code_cache.FILES).write_text("{")
    assert step(filled).stdout.endswith("[7.0, 7.0, 7.0]\n"), "without its list the folder begins anew"


@pytest.mark.slow
def test_folders_that_cannot_be_used_cost_a_word(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        used = code_cache.usable(folder)
        assert used != folder and used.is_dir() and reason in caplog.text
    out = step(tmp_path / "file")
    assert out.stdout == "False [7.0, 7.0, 7.0]\n" and "is not kept" in out.stderr
    monkeypatch.setattr(code_cache, "NEEDED_BYTES", 1 << 60)
    assert code_cache.usable(tmp_path) != tmp_path and "MB are free" in caplog.text


@pytest.mark.slow
def test_a_full_disk_costs_a_word(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("the right to mount a file system is missing; runs as root on Linux")
    try:
        out = step(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert out.stdout == "False [7.0, 7.0, 7.0]\n" and "only 1 MB are free" in out.stderr


@pytest.mark.parametrize("given, want", [("", "/home/x/.cache"), ("relative", "/home/x/.cache"), ("/cache", "/cache")])
def test_the_default_follows_xdg_where_it_is_a_path(given, want, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", "/home/x")
    assert code_cache.default() == Path(want) / "llama_fn"


def test_a_user_without_a_home_compiles_without_keeping(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert code_cache.default() is None and code_cache.usable(None).is_dir()
    assert "this user has no home folder" in caplog.text


@pytest.mark.parametrize(
    "compiler", ["/nonexistent/g++", *(pytest.param(x, marks=pytest.mark.slow) for x in ("/", "false"))]
)
def test_a_missing_compiler_is_one_clear_error(compiler, tmp_path):
    out = step(tmp_path, CXX=compiler)
    assert out.returncode and f"a C++ compiler, and {compiler} (CXX) cannot be run" in out.stderr.splitlines()[-1]
