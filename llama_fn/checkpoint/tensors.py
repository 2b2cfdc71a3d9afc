"""Arrays on disk, as Orbax and JAX lay them: zarr3 in tensorstore's OCDBT, one store for each process that writes.

Orbax merges the stores of the processes when a checkpoint is complete, and reads each array whole by its name; here
every process reads and writes only its regions, with tensorstore alone. Each chunk carries a CRC-32C, which is computed
while it is written and checked while it is read, by whoever reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_fn.checkpoint.arrays_by_name import keys, to_numpy, to_torch
from llama_fn.checkpoint.layout import Stored
from llama_fn.errors import UserError
from sharding.parts import Part, Region

DATA_FILE_BYTES = 2 << 30
_OCDBT = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "manifest_kind": "single"}  # Orbax's


def name_of(path: str) -> str:
    """How Orbax names an array: its keys, joined by dots."""
    return ".".join(keys(path))


def process_folder(folder: Path, process: int) -> Path:
    """Where a process writes, below the folder of the arrays; Orbax looks for folders of such names."""
    return folder / f"ocdbt.process_{process}"


def write(folder: Path, process: int, arrays: Mapping[str, Stored], values: Mapping[str, list[torch.Tensor]]) -> None:
    """Write this process's regions, of `values` one tensor in CPU memory for each, which must stay as they are until
    this returns. OSError or ValueError of tensorstore where that fails. They need not be on disk yet: see
    integrity.sums_of_process."""
    writer = Writer(folder, process)
    pending = [
        writer.begin(path, array, at, value)
        for path, array in arrays.items()
        for (at, _), value in zip(array.written, values.get(path, ()), strict=True)
    ]
    for each in pending:
        each.result()


class Writer:
    """Regions of arrays, into the store of one process. Not in a transaction: that would keep a copy of what is cut
    into chunks until its end."""

    def __init__(self, folder: Path, process: int) -> None:
        # Tensorstore would wait for the disk at every file, one after the other.
        self.ts, self.context = _tensorstore(file_io_sync=False)
        self.store = process_folder(folder, process)
        self.opened: dict[str, Any] = {}

    def begin(self, path: str, array: Stored, at: Region, value: torch.Tensor) -> Any:
        """A future; `value` must stay as it is until that is done."""
        if path not in self.opened:
            # Zeros as well, as Orbax does: a chunk that is not there is one that was lost.
            spec = {**_spec(self.store, name_of(path)), "metadata": _metadata(array)}
            spec["store_data_equal_to_fill_value"] = True
            self.opened[path] = self.ts.open(spec, create=True, open=True, context=self.context).result()
        return self.opened[path][at].write(to_numpy(value), can_reference_source_data_indefinitely=True)

    def write(self, path: str, array: Stored, at: Region, value: torch.Tensor) -> None:
        """One region, now."""
        self.begin(path, array, at, value).result()


class Reader:
    """The arrays of one folder, of ours or of another program that uses Orbax; `zarr3` where no Orbax noted that."""

    def __init__(self, folder: Path, zarr3: bool | None = None) -> None:
        self.ts, self.context = _tensorstore()  # a new one: tensorstore remembers what a path held
        self.folder = folder
        self.ocdbt = (folder / "manifest.ocdbt").exists()
        self.zarr3 = _uses_zarr3(folder) if zarr3 is None else zarr3
        self.opened: dict[str, Any] = {}

    def array(self, path: str) -> Any:
        """The array of a path, of which nothing is read yet."""
        if path not in self.opened:
            driver = "zarr3" if self.zarr3 else "zarr"
            spec = {**_spec(self.folder, name_of(path), driver, self.ocdbt), "fill_missing_data_reads": False}
            self.opened[path] = self.ts.open(spec, open=True, read=True, context=self.context).result()
        return self.opened[path]

    def tensor(self, path: str, at: Region) -> torch.Tensor:
        """Some of it."""
        return to_torch(np.asarray(self.array(path)[at].read().result()))

    def part(self, path: str, part: Part, device: str) -> torch.Tensor:
        """What a device holds of it, on that device."""
        if len(part.pieces) == 1 and tuple(s.stop - s.start for s in part.pieces[0][0]) == part.shape:
            return self.tensor(path, part.pieces[0][0]).to(device)
        return part.filled(lambda at: self.tensor(path, at)).to(device)


def _tensorstore(**settings: Any) -> tuple[Any, Any]:
    import tensorstore

    # Chunks are read and written once: a cache would only keep a copy of them.
    return tensorstore, tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}, **settings})


def _spec(folder: Path, name: str, driver: str = "zarr3", ocdbt: bool = True) -> dict[str, Any]:
    if not ocdbt:
        return {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder / name}/"}}
    base = {"driver": "file", "path": f"{folder}/"}
    kvstore = {
        "driver": "ocdbt", "base": base, "path": f"{name}/", "config": _OCDBT, "target_data_file_size": DATA_FILE_BYTES,
    }  # fmt: skip
    return {"driver": driver, "kvstore": kvstore}


def _metadata(array: Stored) -> dict[str, Any]:
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    return {
        "shape": list(array.shape), "data_type": str(array.dtype).removeprefix("torch."),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunk)}}, "codecs": codecs,
    }  # fmt: skip


def _uses_zarr3(folder: Path) -> bool:
    """As Orbax notes it; its own default is zarr2."""
    try:
        return bool(json.loads((folder / "_METADATA").read_bytes()).get("use_zarr3", False))
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"{folder} has no _METADATA that can be read, so it is no checkpoint of Orbax. Name the folder of its "
            "arrays, such as checkpoints/100/state"
        ) from None
