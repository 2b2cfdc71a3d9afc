"""Saving and restoring 1 GB, beside stock Orbax, torch.distributed.checkpoint and safetensors; host memory for 2 GB.

    python benchmarks/checkpoint.py [FOLDER]

Each way writes and reads the same 1.02 GB (bf16 parameters, two fp32 moments, 24 arrays), three times in turn, and the
best counts. Ours checks every file before it reads and writes checksums; all but safetensors wait for the disk (fsync),
and "synced" is safetensors' file when the disk has it. "Stall" is how long a step would wait: what a save takes before
it returns. Memory that is new to a virtual machine costs seconds per GB, so ours is timed where it has all it needs,
two checkpoints of which one is removed; the others find what a folder that was removed had.
Memory is the peak of a process of its own, beyond what it had with the state in memory.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch

GB = 1e9


def state_of(scale: int = 1) -> dict[str, torch.Tensor]:
    """About a GB for each of `scale`."""
    state = {}
    for i in range(8):
        shape = (4 * scale, 1024, 3112)
        state[f"w{i}"] = torch.randn(shape).bfloat16()
        state[f"m{i}"], state[f"v{i}"] = torch.randn(shape), torch.randn(shape)
    return state


def ours(folder: Path, state: dict) -> tuple[float, float, float]:
    from llama_fn.checkpoint import Store

    store = Store(state, folder, (1, 0))
    for step in (1, 2):  # takes the memory of the host's copy and of two checkpoints, as the first saves of a run do
        store.save(step, state, {})
        store.wait()
    began = time.perf_counter()
    store.save(3, state, {})
    stalled = time.perf_counter()
    store.wait()
    written = time.perf_counter()
    store.close()
    began_read = time.perf_counter()
    store = Store(state, folder, (1, 0))
    got = store.restore(store.find())
    read = time.perf_counter()
    assert all(torch.equal(got[name], x) for name, x in state.items())
    return stalled - began, written - began, read - began_read


def stock(folder: Path, state: dict) -> tuple[float, float, float]:
    import orbax.checkpoint as ocp

    from llama_fn.checkpoint.arrays_by_name import to_numpy

    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
    manager = ocp.CheckpointManager(folder, item_handlers={"state": handler})
    arrays = {name: to_numpy(x) for name, x in state.items()}
    began = time.perf_counter()
    manager.save(1, args=ocp.args.Composite(state=ocp.args.PyTreeSave(arrays)), force=True)
    stalled = time.perf_counter()
    manager.wait_until_finished()
    written = time.perf_counter()
    began_read = time.perf_counter()
    manager.restore(1, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))
    read = time.perf_counter()
    manager.close()
    return stalled - began, written - began, read - began_read


def dcp(folder: Path, state: dict) -> tuple[float, float, float]:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

    began = time.perf_counter()
    checkpoint.save(state, storage_writer=FileSystemWriter(folder, thread_count=2), no_dist=True)
    written = time.perf_counter()
    into = {name: torch.empty_like(x) for name, x in state.items()}
    began_read = time.perf_counter()
    checkpoint.load(into, storage_reader=FileSystemReader(folder), no_dist=True)
    return written - began, written - began, time.perf_counter() - began_read


def safetensors(folder: Path, state: dict) -> tuple[float, float, float]:
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    began = time.perf_counter()
    save_file(state, folder / "x.safetensors")
    written = time.perf_counter()
    got = {name: x.clone() for name, x in load_file(folder / "x.safetensors").items()}  # out of the mapped file
    read = time.perf_counter()
    assert len(got) == len(state)
    return written - began, written - began, read - written


def synced(folder: Path, state: dict) -> tuple[float, float, float]:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    began = time.perf_counter()
    save_file(state, folder / "x.safetensors")
    with open(folder / "x.safetensors", "rb") as f:
        os.fsync(f.fileno())
    written = time.perf_counter() - began
    return written, written, math.inf  # read as the other is


def memory(what: str, folder: Path) -> None:
    """Of a process of its own: prints the MB that its peak lies above what it had before."""
    from llama_fn.checkpoint import Store
    from llama_fn.model.arrays import abstract

    state = state_of(2)
    store = Store({name: abstract(x) for name, x in state.items()}, folder, (1, 0))
    if what == "restore":
        state.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _peak()
    if what == "save":
        store.save(1, state, {})
        store.close()
    else:
        store.restore(store.find())
    print(_peak() - before)


def _peak() -> float:
    """MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e3


def main() -> None:
    """Print a table."""
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    if len(sys.argv) > 2:
        memory(sys.argv[2], where)
        return
    state = state_of()
    size = sum(x.nbytes for x in state.values())
    best: dict[str, list[float]] = {}
    for _ in range(3):
        for fn in (ours, stock, dcp, safetensors, synced):
            folder = where / fn.__name__
            found = fn(folder, state)
            shutil.rmtree(folder)
            best[fn.__name__] = [min(pair) for pair in zip(best.get(fn.__name__, found), found, strict=True)]
    print(f"| {size / GB:.2f} GB | ms stall per GB | write GB/s | read GB/s |\n| --- | --- | --- | --- |")
    for name, (stall, write, read) in best.items():
        speed = f"{size / GB / read:.2f}" if math.isfinite(read) else ""
        print(f"| {name} | {stall * 1e3 / (size / GB):.0f} | {size / GB / write:.2f} | {speed} |")
    rest = [found for name, found in best.items() if name not in ("ours", "safetensors")]
    print(f"write: {min(found[1] for found in rest) / best['ours'][1]:.2f} of the fastest that waits for the disk")
    rest.append(best["safetensors"])
    print(f"read: {min(found[2] for found in rest) / best['ours'][2]:.2f} of the fastest, which checks nothing")
    for what in ("save", "restore"):
        command = [sys.executable, __file__, str(where / "memory"), what]
        taken = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(f"{what} of {2 * size / GB:.2f} GB: {taken:.0f} MB of host memory, {taken / (2 * size / 1e6):.2f} of it")
    shutil.rmtree(where)


if __name__ == "__main__":
    main()
