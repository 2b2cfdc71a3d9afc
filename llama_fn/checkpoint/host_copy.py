"""What a process writes of its state, copied into CPU memory that is kept from save to save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llama_fn import tree
from llama_fn.checkpoint.layout import Stored


class HostCopy:
    """The step overwrites the state while it is being written, so that is a copy. Its memory is that of the regions
    that this process writes, taken at the first save: memory that is new costs more time than the copy."""

    def __init__(self) -> None:
        self.held: dict[str, list[torch.Tensor]] = {}

    def of(self, state: Any, arrays: Mapping[str, Stored]) -> dict[str, list[torch.Tensor]]:
        """By path a tensor for each region; valid until the next call."""
        values = tree.by_path(state)
        for path, array in arrays.items():
            regions = [values[path].detach()[to] for _, to in array.written]
            if path not in self.held:
                self.held[path] = [torch.empty(x.shape, dtype=x.dtype) for x in regions]
            for held, x in zip(self.held[path], regions, strict=True):
                held.copy_(x, non_blocking=x.device.type != "cpu")
        _wait(tree.leaves(state))
        return self.held


def _wait(leaves: list[torch.Tensor]) -> None:
    """For copies from a device."""
    device = leaves[0].device
    if device.type != "cpu":
        torch.get_device_module(device.type).current_stream().synchronize()
