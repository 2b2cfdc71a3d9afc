"""Proven damage is set aside, nothing else is, and whatever a checkpoint holds is covered."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fn.checkpoint import Store, integrity, tensors
from llama_fn.checkpoint.quiet import quieten_orbax
from llama_fn.errors import UserError

STATE = {"x": torch.arange(6.0), "y": {"z": torch.ones(2, dtype=torch.bfloat16)}, "step": torch.tensor(3)}


@pytest.fixture
def folder(tmp_path):
    store = Store(STATE, tmp_path / "checkpoints", (3, 0))
    for step in (1, 2):
        store.save(step, {**STATE, "x": STATE["x"] + step}, {"iterator": {"consumed_samples": 4 * step}})
    store.close()
    return tmp_path / "checkpoints"


def find(folder):
    store = Store(STATE, folder, (3, 0))
    found = store.find()
    state = store.restore(found)
    store.close()
    assert torch.equal(state["x"], STATE["x"] + found.step)
    assert found.meta["iterator"]["consumed_samples"] == 4 * found.step
    return found.step


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_every_file_is_covered(folder, caplog):
    """One byte after the other: the checkpoint is set aside, or its list of sums is made again."""
    names = [path.relative_to(folder / "2") for path in files(folder / "2")]
    assert len(names) > 8
    for name in names:
        good = (folder / "2" / name).read_bytes()
        flip(folder / "2" / name)
        store = Store(STATE, folder, (3, 0))
        found = store.find()
        store.close()
        if name == Path(integrity.SUMS):
            assert found.step == 2 and integrity.is_sealed(folder / "2")
            continue
        assert found.step == 1 and f"{name} has another checksum" in caplog.text
        (moved,) = (folder.parent / "damaged").iterdir()
        moved.rename(folder / "2")
        (folder / "2" / name).write_bytes(good)
    assert find(folder) == 2


def test_any_bit_of_any_file_counts(folder):
    """Twenty of each, by the sums alone."""
    chance = random.Random(0)
    for path in files(folder / "2"):
        good = path.read_bytes()
        for _ in range(20):
            at = chance.randrange(len(good))
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << chance.randrange(8))]) + good[at + 1 :])
            if path.name == integrity.SUMS:
                assert not integrity.is_sealed(folder / "2"), "no list is believed that is not what was written"
                continue
            with pytest.raises(integrity.Damaged, match=f"{path.name} has another checksum"):
                integrity.check(folder / "2")
        path.write_bytes(good)
    integrity.check(folder / "2")


@pytest.mark.parametrize("harm", ["truncated", "missing", "longer"])
def test_files_of_another_size_or_none_prove_damage(harm, folder, caplog):
    victim = folder / "2" / "meta" / "metadata"
    content = victim.read_bytes()
    victim.write_bytes({"truncated": content[:-9], "longer": content + b" "}.get(harm, b""))
    if harm == "missing":
        victim.unlink()
    assert find(folder) == 1
    assert f"checkpoint {folder / '2'} is damaged (meta/metadata" in caplog.text
    assert len(caplog.text.splitlines()) == 1


def test_a_checkpoint_without_its_list_proves_itself(folder, caplog):
    """As after a kill between Orbax's rename and the list: arrays are listed before, and meta has a sum of its own."""
    (folder / "2" / integrity.SUMS).unlink()
    assert find(folder) == 2 and (folder / "2" / integrity.SUMS).exists()
    (folder / "2" / integrity.SUMS).unlink()
    victim = folder / "2" / "meta" / "metadata"
    victim.write_bytes(victim.read_bytes().replace(b'"consumed_samples": 8', b'"consumed_samples": 9'))
    assert find(folder) == 1 and "meta/metadata has another checksum" in caplog.text


@pytest.mark.parametrize("step", [1, 2])
def test_what_cannot_be_read_is_named_and_left_alone(step, folder, monkeypatch):
    """Permissions, disks and networks: an error that moves nothing, whichever file it is."""
    before = files(folder)
    flip(folder / "2" / "state" / "_METADATA") if step == 1 else None
    refused = folder / str(step) / "meta" / "metadata"
    real = open

    def refusing(path, *args, **kwargs):
        if Path(path) == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(UserError, match=f"{refused} cannot be read: Permission denied"):
        Store(STATE, folder, (3, 0)).find()
    if step == 2:
        assert files(folder) == before


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), ValueError("RESOURCE_EXHAUSTED")])
def test_an_error_of_a_library_proves_nothing(error, folder, monkeypatch):
    before, store = files(folder), Store(STATE, folder, (3, 0))
    found = store.find()

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(tensors.Reader, "array", fails)
    with pytest.raises(UserError, match="does not prove that it is damaged, so nothing was moved"):
        store.restore(found)
    assert files(folder) == before


def test_a_chunk_that_changes_while_it_is_read_is_refused(tmp_path):
    """Behind the check of files, as memory or a library would change it."""
    state = {"x": torch.arange(1000.0)}
    store = Store(state, tmp_path, (3, 0))
    store.save(1, state, {})
    store.wait()
    found = store.find()
    written = (tmp_path / "1" / "state" / "ocdbt.process_0" / "d").iterdir()
    victim = max(written, key=lambda file: file.stat().st_size)
    content = victim.read_bytes()
    at = content.index(state["x"].numpy().tobytes())
    victim.write_bytes(content[: at + 400] + bytes([content[at + 400] ^ 1]) + content[at + 401 :])
    with pytest.raises(UserError, match=r"cannot be read .*, which does not prove that it is damaged"):
        store.restore(found)


TRUNCATED = """
import sys, torch
from pathlib import Path
from llama_fn.checkpoint import Store
folder = Path(sys.argv[1])
state = {f"x{i}": torch.randn(300, 300) for i in range(40)}
store = Store(state, folder, (2, 0))
store.save(1, state, {})
store.close()
store = Store(state, folder, (2, 0))
found = store.find()
for file in (folder / "1" / "state").rglob("*"):
    if file.is_file() and file.stat().st_size > 20_000:
        file.write_bytes(file.read_bytes()[:100])
try:
    store.restore(found)
except ValueError as error:
    print(error)
"""


def test_other_reads_that_fail_with_it_say_nothing(caplog):
    """Which of them asyncio still tells of depends on when garbage is collected."""
    quieten_orbax()
    for text in ("Task exception was never retrieved\nfuture: <Task finished>", "something else"):
        logging.getLogger("asyncio").error(text)
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.slow
def test_a_read_that_fails_is_one_line_and_no_tracebacks_of_threads(tmp_path):
    command = [sys.executable, "-c", TRUNCATED, str(tmp_path / "checkpoints")]
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "does not prove that it is damaged" in out.stdout and "Traceback" not in out.stderr, out.stderr
    assert len(out.stderr.splitlines()) <= 1


def test_another_state_is_refused_leaf_by_leaf_and_nothing_moves(folder):
    before = files(folder)
    other = {"x": torch.zeros(7), "y": {"z": torch.ones(2)}, "new": torch.ones(1)}
    with pytest.raises(UserError) as error:
        Store(other, folder, (3, 0)).find()
    for line in ("state.x: saved f32[6], needed f32[7]", "state.y.z: saved bf16[2], needed f32[2]",
                 "state.new: saved nothing, needed f32[1]", "state.step: saved i64[], needed nothing"):  # fmt: skip
        assert line in str(error.value)
    assert files(folder) == before


def test_names_that_are_no_checkpoints_are_told(folder):
    os.symlink(folder / "gone", folder / "9")
    with pytest.raises(UserError, match=r"9 is a link to .*gone, which is not there"):
        Store(STATE, folder, (3, 0))
    (folder / "9").unlink()
    (folder / "9").write_text("")
    with pytest.raises(UserError, match="9 is no folder"):
        Store(STATE, folder, (3, 0))


def test_damage_that_cannot_be_moved_is_told(folder):
    flip(folder / "2" / "state" / "_METADATA")
    (folder.parent / "damaged").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="is damaged and cannot be moved to"):
        Store(STATE, folder, (3, 0)).find()
    assert (folder / "2").is_dir()


def test_damage_found_twice_keeps_both(folder):
    (folder.parent / "damaged" / "2.damaged").mkdir(parents=True)
    flip(folder / "2" / "state" / "_METADATA")
    assert find(folder) == 1
    assert sorted(p.name for p in (folder.parent / "damaged").iterdir()) == ["2.damaged", "2.damaged.1"]


def test_a_folder_of_checkpoints_that_is_none_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints cannot be read: File exists"):
        Store(STATE, tmp_path / "checkpoints", (3, 0))
