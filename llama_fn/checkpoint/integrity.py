"""Whether a checkpoint on disk is what was written: proof of damage, and nothing else taken for it.

SUMS, written into a checkpoint's folder once Orbax has put it in its place, lists size and CRC-32 of every file there.
A file that differs from its sum, or is gone, proves damage. A file that this user may not read, or that a disk or
network does not give, proves nothing: that is an error, which leaves everything where it is.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from llama_fn.errors import UserError
from llama_fn.files import atomic, checksum, files_below

SUMS = "sums.json"


class Damaged(Exception):
    """Proof that a checkpoint is not what was written, in one line."""


def seal(folder: Path) -> None:
    """List what the files of a complete checkpoint hold."""
    files = {name: checksum(path) for name, path in files_below(folder, _counts).items()}
    with atomic(folder / SUMS) as f:
        json.dump({"files": files, "crc32": of_json(files)}, f)


def is_whole(folder: Path) -> bool:
    """True for a checkpoint whose files are all as they were listed, False where there is no list to hold them to.

    Damaged for proof of the contrary; UserError naming a file that cannot be read.
    """
    listed = _listed(folder)
    for name, wanted in listed.items():
        path = folder / name
        try:
            actual = checksum(path)
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise unreadable(path, error) from None
        if actual != wanted:
            what = f"has {actual[0]} bytes instead of {wanted[0]}" if actual[0] != wanted[0] else "has another checksum"
            raise Damaged(f"{name} {what}")
    return bool(listed)


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


def _listed(folder: Path) -> dict[str, list[int]]:
    """The list, empty where there is none or where it is itself damaged: then the checkpoint has to prove itself."""
    try:
        content = json.loads((folder / SUMS).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise unreadable(folder / SUMS, error) from None
    good = isinstance(content, dict) and content.get("crc32") == of_json(content.get("files"))
    return content["files"] if good else {}
