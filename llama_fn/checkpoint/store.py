"""Checkpoints of the whole state whatever the mesh: the first process holds and writes it, the others send their parts.

So a run saved on one mesh is resumed on any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_fn import tree
from llama_fn.checkpoint.orbax import Checkpointer, SavedStep
from llama_fn.config import Config
from llama_fn.distributed import Processes, by_chief
from llama_fn.model import train_step
from sharding import P
from sharding.parts import Part


class Store:
    """The checkpoints of a run of one or several processes; UserErrors of the first are raised in all of them."""

    def __init__(self, cfg: Config, folder: Path, processes: Processes | None) -> None:
        self.folder, self.processes, self.device = folder.absolute(), processes, cfg.run.device
        self.keep = (cfg.run.keep_latest, cfg.run.keep_every)
        self.infos = train_step.abstract_state(cfg)
        self.checkpointer: Checkpointer | None = None  # the first process's, once it has looked for one

    def find(self, check: Callable[[SavedStep], None]) -> SavedStep | None:
        """The newest good checkpoint, or None where there is none; UserError where `check` raises it, and where its
        arrays are others than this configuration's."""

        def find() -> SavedStep | None:
            self.checkpointer = Checkpointer(self.folder, *self.keep)
            saved_step = self.checkpointer.find()
            if saved_step is not None:
                check(saved_step)
                self.checkpointer.refuse_other_arrays(saved_step, self.infos)
            return saved_step

        return by_chief(self.processes, find)

    def restore(self, saved_step: SavedStep, layouts: Sequence[P]) -> Any:
        """This process's part of the state of a checkpoint, sharded by `layouts`."""
        whole: list[Any] = []

        def read() -> None:
            assert self.checkpointer is not None
            device = self.device if self.processes is None else "cpu"
            whole.append(self.checkpointer.restore(saved_step, self.infos, device))

        by_chief(self.processes, read)
        if self.processes is None:
            return whole[0]
        return self.processes.scatter_state(whole[0] if whole else None, self.infos, self._own(layouts), self.device)

    def save(self, iteration: int, state: Any, meta: dict[str, Any], layouts: Sequence[P]) -> None:
        """Save the state as of `iteration`, with `meta` beside it, while the run goes on; `layouts`: of its leaves."""
        if self.processes is not None:
            state = self.processes.gathered(state, self.infos, self._own(layouts))
        if self.checkpointer is not None:
            self.checkpointer.save(iteration, state, meta)

    def parts(self, layouts: Sequence[P]) -> list[Part] | None:
        """What this process holds of each leaf; None for a single process, which holds all."""
        return None if self.processes is None else self.processes.parts(self.infos, self._own(layouts))

    def _own(self, layouts: Sequence[P]) -> Sequence[P]:
        """The shardings of the state, which come first among a step's inputs."""
        return layouts[: len(tree.leaves(self.infos))]

    def settle(self) -> None:
        """Wait until nothing is being written."""
        if self.checkpointer is not None:
            self.checkpointer.settle()

    def close(self) -> None:
        """Finish what is being written; UserError where that failed."""
        if self.checkpointer is not None:
            self.checkpointer.close()
