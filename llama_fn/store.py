"""Checkpoints of the whole state whatever the mesh: the first process holds and writes it, the others send their parts.

So a run saved on one mesh is resumed on any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_fn import arrays, train_step, tree
from llama_fn.checkpoint import Checkpointer
from llama_fn.config import Config
from llama_fn.processes import Processes
from sharding import P


class Store:
    def __init__(self, cfg: Config, folder: Path, processes: Processes | None) -> None:
        self.folder, self.processes, self.device = folder.absolute(), processes, cfg.run.device
        self.infos = train_step.abstract_state(cfg)
        self.layouts: Sequence[P] = ()
        chief = processes is None or processes.chief
        self.checkpointer = Checkpointer(folder, cfg.run.keep_latest, cfg.run.keep_every) if chief else None

    def laid_out(self, layouts: Sequence[P]) -> Store:
        """The store of a state whose leaves are sharded by the first of `layouts`."""
        self.layouts = layouts[: len(tree.leaves(self.infos))]
        return self

    def parts(self) -> list[arrays.Part] | None:
        return None if self.processes is None else self.processes.parts(self.infos, self.layouts)

    def save(self, iteration: int, state: Any, meta: dict[str, Any]) -> None:
        if self.processes is not None:
            state = self.processes.gathered(state, self.infos, self.layouts)
        if self.checkpointer is not None:
            self.checkpointer.save(iteration, state, meta)

    def restore_latest(self) -> tuple[int, Any, dict[str, Any]] | None:
        """(iteration, state, meta) of the newest good checkpoint, or None where there is none."""
        if self.processes is None:
            assert self.checkpointer is not None
            return self.checkpointer.restore_latest(self.infos, self.device)
        found = self.checkpointer.restore_latest(self.infos, "cpu") if self.checkpointer is not None else None
        head = self.processes.told(None if found is None else (found[0], found[2]["iterator"]))
        if head is None:
            return None
        state = self.processes.spread(found[1] if found else None, self.infos, self.layouts, self.device)
        return head[0], state, {"iterator": head[1]}

    def settle(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.settle()

    def close(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close()
