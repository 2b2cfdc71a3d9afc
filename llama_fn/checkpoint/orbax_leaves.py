"""Arrays that Orbax does not hold: it makes their folder and their metadata, and waits for who writes them.

By Orbax's public TypeHandler. Orbax notes the type of each array; ours say that they are NumPy's, so that whoever
restores a checkpoint, plain JAX among them, needs nothing of this file. Imports orbax.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import torch
from orbax.checkpoint import future, type_handlers


@dataclass(frozen=True)
class Leaf:
    """An array of a checkpoint, for Orbax."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class LeafHandler(type_handlers.NumpyHandler):
    """Saves all leaves of a tree by one call of `write(folder)`, in a thread."""

    def __init__(self, write: Callable[[Path], None]) -> None:
        super().__init__()
        self.write = write

    async def serialize(
        self, values: Sequence[Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[future.Future]:
        """Begins to write; what is returned is done when all is written."""
        return [future.CommitFutureAwaitingContractedSignals(self._write(infos), name="llama_fn")]

    async def _write(self, infos: Sequence[Any]) -> None:
        for info in infos:
            await info.await_path_creation()
        await asyncio.to_thread(self.write, Path(infos[0].parent_dir))


def registry(write: Callable[[Path], None]) -> Any:
    """Orbax's registry of the types that a tree may hold: Leaf; and JAX's own, without which Orbax warns."""
    ours = (Leaf, LeafHandler(write))
    return type_handlers.create_type_handler_registry(ours, (jax.Array, type_handlers.ArrayHandler()))
