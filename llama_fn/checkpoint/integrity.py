"""Whether a checkpoint on disk is what was written: proof of damage, and nothing else taken for it.

Two lists in a checkpoint's folder have size and CRC-32 of files. SHARDS has what processes wrote of the arrays; it is
part of the checkpoint from the beginning. SUMS has every file; it is written once Orbax has put the folder in its
place. A file that differs from its sum, or is gone, proves damage. A file that this user may not read, or that a disk
or network does not give, proves nothing: that is an error, which leaves everything where it is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_fn import progress
from llama_fn.errors import UserError
from llama_fn.files import atomic, checksum, files_below, sync

SUMS, SHARDS = "sums.json", "shards.json"
THREADS = 4  # a CRC-32 takes 1 to 2 GB/s of a core, disks give more
Sums = Mapping[str, list[int]]


class Damaged(Exception):
    """Proof that a checkpoint is not what was written, in one line."""


def sums_of(folder: Path, known: Sums = {}) -> dict[str, list[int]]:  # noqa: B006
    """Size and CRC-32 of every file below a folder, by name; those that are `known` are not read again."""
    files = {name: path for name, path in files_below(folder, _counts).items() if name not in known}
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(files, threads.map(checksum, files.values()), strict=True)) | dict(known)


def sums_of_process(folder: Path, mine: Path) -> dict[str, list[int]]:
    """Of what a process wrote into `mine`, below the folder of an item, named from the checkpoint's folder. The disk
    has it once this returns; OSError where it does not take it."""
    folders = {folder, mine, *(path.parent for path in files_below(mine).values())}
    with ThreadPoolExecutor(THREADS) as threads:
        on_disk = [threads.submit(sync, path) for path in [*files_below(mine).values(), *folders]]
        sums = sums_of(mine)  # meanwhile
        for each in on_disk:
            each.result()
    # Orbax's folder of an item has another name until the checkpoint is complete: state.orbax-checkpoint-tmp.
    item = folder.name.partition(".")[0]
    return {f"{item}/{mine.name}/{file}": each for file, each in sums.items()}


def write_list(path: Path, sums: Sums) -> None:
    """One of the two lists."""
    with atomic(path) as f:
        json.dump({"files": sums, "crc32": of_json(sums)}, f)


def seal(folder: Path) -> None:
    """List what the files of a complete checkpoint hold, those of SHARDS as they were written."""
    write_list(folder / SUMS, sums_of(folder, _listed(folder / SHARDS)))


def is_sealed(folder: Path) -> bool:
    """Whether every file is listed; else the files that are not have to prove themselves."""
    return bool(_listed(folder / SUMS))


def check(folder: Path, share: int = 0, of: int = 1) -> None:
    """Compare the files that are listed with their sums; of several processes each a `share`.

    Damaged for proof of the contrary; UserError naming a file that cannot be read.
    """
    listed = _listed(folder / SUMS) or _listed(folder / SHARDS)
    largest_first = sorted(listed, key=lambda name: (-listed[name][0], name))
    with ThreadPoolExecutor(THREADS) as threads:
        own = largest_first[share::of]
        compared = threads.map(lambda name: _compare(folder / name, name, listed[name]), own)
        for _ in progress.tracked(own):
            next(compared)


def _compare(path: Path, name: str, wanted: list[int]) -> None:
    try:
        actual = checksum(path)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if actual != wanted:
        what = f"has {actual[0]} bytes instead of {wanted[0]}" if actual[0] != wanted[0] else "has another checksum"
        raise Damaged(f"{name} {what}")


def read_meta(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides the arrays; Damaged where that is not what was written."""
    path = folder / "meta" / "metadata"
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Damaged("meta/metadata is missing") from None
    except ValueError:  # not JSON, not even text
        raise Damaged("meta/metadata is not JSON") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not isinstance(meta, dict) or meta.pop("crc32", None) != of_json(meta):
        raise Damaged("meta/metadata has another checksum than when it was saved")
    return meta


def unreadable(path: Path, error: OSError) -> UserError:
    """What to say of a file or folder that is not given to us."""
    return UserError(
        f"{path} cannot be read: {error.strerror or error}. That is no damage, so nothing was moved. Mend it and start "
        "the same command again"
    )


def of_json(value: Any) -> int:
    """The CRC-32 of a JSON value, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _counts(name: str) -> bool:
    return name != SUMS and not name.startswith(".")


def _listed(path: Path) -> dict[str, list[int]]:
    """A list, empty where there is none or where it is itself damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise unreadable(path, error) from None
    good = isinstance(content, dict) and content.get("crc32") == of_json(content.get("files"))
    return content["files"] if good else {}
