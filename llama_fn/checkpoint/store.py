"""The checkpoints of a run whatever the mesh: every process writes and reads what it holds, and no other.

So a run saved on one mesh is resumed on any other, and no process ever has more of an array than its own part. The
processes speak through torch.distributed's store, not by collectives, so that saving can go on beside a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llama_fn import progress, tree
from llama_fn.checkpoint import layout, tensors
from llama_fn.checkpoint.integrity import Damaged, check, is_sealed, read_meta, seal
from llama_fn.checkpoint.local import LocalCopies
from llama_fn.checkpoint.orbax import Checkpoints, SavedStep
from llama_fn.checkpoint.saving import Saver
from llama_fn.distributed import Processes, by_chief
from llama_fn.errors import SaidElsewhere, UserError
from llama_fn.model.arrays import describe
from sharding import Mesh, P
from sharding.parts import Part

log = logging.getLogger("llama_fn.checkpoint")


class Store:
    """The checkpoints of a run of one or several processes; UserErrors of the first are raised in all of them.

    `infos`: the declaration of the state. `keep`: how many of the newest, and which multiple besides. `local`: copies
    that are made between checkpoints.
    """

    def __init__(
        self, infos: Any, folder: Path, keep: tuple[int, int], processes: Processes | None = None, device: str = "cpu",
        local: LocalCopies | None = None,
    ) -> None:  # fmt: skip
        self.infos, self.folder, self.processes, self.device = infos, folder.absolute(), processes, device
        self.rank, self.mesh = (processes.rank, processes.mesh) if processes else (0, Mesh())
        self.local, self.newest = local, 0  # the iteration of the newest checkpoint that `find` left
        self.looks = 0  # how often `find` was called: what processes say of a step they may say again
        opened: list[Checkpoints] = []
        by_chief(processes, lambda: opened.append(Checkpoints(self.folder, *keep)))
        self.checkpoints = opened[0] if opened else None  # the first process's
        self.saver = Saver(self.checkpoints, processes)

    def find(
        self, accept: Callable[[SavedStep], None] = lambda saved: None, config: Mapping[str, Any] = MappingProxyType({})
    ) -> SavedStep | None:
        """The newest good checkpoint or local copy, or None where there is none. A checkpoint that is proven to be
        damaged is named, moved aside and passed over. `config`: the flags of this start, for local copies.

        UserError where `accept` raises it, where the arrays are others than the state's, where none of several is good,
        and where one cannot be read: then nothing is touched.
        """
        self.looks += 1
        steps: list[int] = by_chief(self.processes, lambda: self._first.steps())
        self.newest = steps[-1] if steps else 0
        for step in [*reversed(steps), 0]:
            if self.local is not None and (copy := self.local.newest(step, config, accept)) is not None:
                return copy
            if not step:
                break
            saved_step, damage = by_chief(self.processes, lambda: self._known(step, accept))  # noqa: B023
            damage = damage or self._checked(step)
            if not damage:
                return saved_step
            if self.rank == 0:
                log.error("checkpoint %s is damaged (%s); trying the one before", self.folder / str(step), damage)
            by_chief(self.processes, lambda: self._first.set_aside(step))  # noqa: B023
            self.newest = max([0, *(s for s in steps if s < step)])
        if steps:
            raise UserError(
                f"no checkpoint in {self.folder} can be restored (tried {steps[::-1]}; they were moved to ../damaged). "
                "Start in another --run.workdir, or bring back a copy"
            )
        return None

    @property
    def _first(self) -> Checkpoints:
        assert self.checkpoints is not None, "of the first process only"
        return self.checkpoints

    def _known(self, step: int, accept: Callable[[SavedStep], None]) -> tuple[SavedStep | None, str]:
        """What is known of a checkpoint before its arrays are looked at, or what proves damage."""
        try:
            saved_step = SavedStep(step, read_meta(self.folder / str(step)))
        except Damaged as damage:
            return None, str(damage)
        accept(saved_step)
        wanted = {path: describe(info) for path, info in tree.by_path(self.infos).items()}
        self._first.refuse_other_arrays(saved_step, wanted)
        return saved_step, ""

    def _checked(self, step: int) -> str:
        """What proves damage, "" where nothing does; each process looks at a share of the files."""
        folder, word, error = self.folder / str(step), "", None
        try:
            check(folder, self.rank, self.mesh.size)
            if self.rank == 0 and not is_sealed(folder):  # the run was killed before: what is not listed proves itself
                reader = tensors.Reader(folder / "state")
                for path in tree.by_path(self.infos):
                    reader.array(path)
                seal(folder)
        except Damaged as damage:
            word = f"damaged {damage}"
        except (ValueError, OSError) as wrong:  # tensorstore's; a UserError is a ValueError
            word, error = "unreadable", wrong if isinstance(wrong, UserError) else self._unreadable(step, wrong)
        words = self._agreed(f"checked.{self.looks}.{step}", word, error)
        return next((each.removeprefix("damaged ") for each in words if each), "")

    def _agreed(self, about: str, word: str, error: UserError | None) -> list[str]:
        """What every process says; `error` here, and SaidElsewhere where one has another."""
        words = self.saver.words(about, word)
        if error is not None:
            raise error
        if "unreadable" in words:
            raise SaidElsewhere("another process cannot read its part")
        return words

    def _unreadable(self, step: int, error: Exception) -> UserError:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return UserError(
            f"checkpoint {self.folder / str(step)} cannot be read ({reason}), which does not prove that it is "
            "damaged, so nothing was moved. Start again once the cause is gone, or move that folder away to go on "
            "from the one before"
        )

    def restore(self, saved_step: SavedStep, layouts: Sequence[P] | None = None) -> Any:
        """This process's part of the state of a checkpoint, sharded by `layouts`; without, all of it. UserError where
        it cannot be read, or where a chunk is not what its CRC-32C says."""
        parts = layout.parts(self.infos, self._own(layouts), self.mesh, self.rank)
        if saved_step.local:
            assert self.local is not None
            return self.local.restore(saved_step.step, self.infos, parts, self.device)
        values: dict[str, torch.Tensor] = {}
        error = None
        try:
            reader = tensors.Reader(self.folder / str(saved_step.step) / "state")
            for path, part in progress.tracked(list(parts.items()), lambda item: item[0]):
                values[path] = reader.part(path, part, self.device)
        except (ValueError, OSError) as wrong:  # every kind of tensorstore's
            error = self._unreadable(saved_step.step, wrong)
        self._agreed(f"restored.{self.looks}.{saved_step.step}", "unreadable" if error else "", error)
        return tree.map_with_path(lambda path, _: values[path], self.infos)

    def save(self, iteration: int, state: Any, meta: dict[str, Any], layouts: Sequence[P] | None = None) -> None:
        """Save the state as of `iteration`, with `meta` beside it, while the run goes on; `layouts`: of its leaves."""
        arrays = layout.stored(self.infos, self._own(layouts), self.mesh, self.rank)
        self.saver.begin(iteration, state, meta, arrays)

    def copy(self, iteration: int, state: Any, meta: dict[str, Any]) -> None:
        """The same as a local copy."""
        assert self.local is not None
        self.local.save(iteration, state, meta)

    def bytes(self, layouts: Sequence[P]) -> int:
        """What this process writes at a save."""
        return layout.written_bytes(layout.stored(self.infos, self._own(layouts), self.mesh, self.rank))

    def parts(self, layouts: Sequence[P]) -> list[Part] | None:
        """What this process holds of each leaf; None for a single process, which holds all."""
        own = self._own(layouts)
        return None if self.processes is None or own is None else self.processes.parts(self.infos, own)

    def _own(self, layouts: Sequence[P] | None) -> Sequence[P] | None:
        """The shardings of the state, which come first among a step's inputs; None where this process has all of it."""
        return None if self.processes is None or layouts is None else layouts[: len(tree.leaves(self.infos))]

    def wait(self) -> None:
        """Until nothing is being written here."""
        self.saver.wait()
        if self.local is not None:
            self.local.wait()

    def close(self, complete: bool = True) -> None:
        """Finish what is being written; UserError, in all processes, where the last save failed. `complete`: a
        checkpoint has the state as it is now, so that local copies are worth nothing any more."""
        self.wait()
        failure = self.saver.words("closed", self.saver.failure)[0]
        self.saver.thread.shutdown()
        if self.local is not None:
            self.local.close(remove=not failure and complete)
        if self.checkpoints is not None and not failure:  # Orbax would raise the failure again
            self.checkpoints.close()
        if failure:
            error = f"{failure}. Mend that, or free some space, and start the same command again"
            raise UserError(error) if self.rank == 0 else SaidElsewhere(error)
