"""How fast each mesh axis is: gathers along it, timed."""

from __future__ import annotations

import time
from typing import Any

import torch

from llama_fn import compat
from llama_fn.distributed.processes import Processes
from sharding.collectives import axes_of

BYTES = 64 << 20  # what each device gives: large enough that starting it does not count
REPEATS = 5


def by_axis(
    processes: Processes, device: str, per_machine: int, size: int = BYTES, most: int | None = None
) -> list[dict[str, Any]]:
    """A row for each axis of the mesh: its devices, whether it stays `inside` of a machine, and the bytes/s that a
    device sends in a gather of `size` bytes from each, the best of several. `most`: bytes that a gather gives, for
    which many devices give less."""
    rows = []
    for axis, n in processes.mesh.axes:
        groups = processes.groups([axis])
        if n == 1:
            continue
        group = processes.mesh.group_of(processes.rank, axes_of(axis))
        gather = compat.collective_forms(groups)["all_gather"]
        each = size if most is None else min(size, most // n)
        given = torch.ones(each // 4, device=device)
        seconds = min(_timed(gather, given, axis, n, device) for _ in range(REPEATS))
        inside = max(group) - min(group) < per_machine
        rows.append({"axis": axis, "devices": n, "inside": inside, "bytes_per_s": (n - 1) * each / seconds})
    return rows


def _timed(gather: Any, given: torch.Tensor, axis: str, n: int, device: str) -> float:
    synchronize = torch.get_device_module(torch.device(device).type).synchronize
    synchronize()
    began = time.perf_counter()
    gather(given, axis, n, 0)
    synchronize()
    return time.perf_counter() - began
