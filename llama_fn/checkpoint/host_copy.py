"""What a process writes of its state, copied into CPU memory that is kept from save to save."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from llama_fn import tree
from llama_fn.checkpoint.layout import Stored

BLOCK_BYTES = 64 << 20


class HostCopy:
    """The step overwrites the state while it is being written, so that is a copy. Its memory is that of the regions
    that this process writes, taken at the first save: memory that is new costs more time than the copy."""

    def __init__(self) -> None:
        self.held: dict[str, list[torch.Tensor]] = {}
        self.threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="host-copy")

    def of(self, state: Any, arrays: Mapping[str, Stored]) -> dict[str, list[torch.Tensor]]:
        """By path a tensor for each region; valid until the next call."""
        values = tree.by_path(state)
        blocks: list[tuple[int, int, int]] = []
        for path, array in arrays.items():
            regions = [values[path].detach()[to] for _, to in array.written]
            if path not in self.held:
                self.held[path] = [torch.empty(x.shape, dtype=x.dtype) for x in regions]
            for held, x in zip(self.held[path], regions, strict=True):
                if x.device.type == "cpu" and x.is_contiguous():
                    blocks += _blocks(held, x)
                else:
                    held.copy_(x, non_blocking=x.device.type != "cpu")
        # The C library writes large blocks past the caches; torch's copy first reads what it overwrites.
        list(self.threads.map(lambda block: ctypes.memmove(*block), blocks))
        _wait(tree.leaves(state))
        return self.held


def _blocks(into: torch.Tensor, x: torch.Tensor) -> list[tuple[int, int, int]]:
    """Where to, where from, and how many bytes, of pieces that threads copy."""
    starts = range(0, x.nbytes, BLOCK_BYTES)
    return [(into.data_ptr() + i, x.data_ptr() + i, min(BLOCK_BYTES, x.nbytes - i)) for i in starts]


def _wait(leaves: list[torch.Tensor]) -> None:
    """For copies from a device."""
    device = leaves[0].device
    if device.type != "cpu":
        torch.get_device_module(device.type).current_stream().synchronize()
