"""Checkpoints through Orbax, in the first process of a run: asynchronous, atomic, and readable by plain JAX.

A checkpoint of iteration i is folder i with the items `state` (nested dicts of arrays named by tree path) and `meta`
(JSON: iterator state, config, and of every array shape and dtype). Orbax writes into a temporary folder and renames it,
so a checkpoint that can be seen is complete. What the arrays hold is written by all processes (saving.py): Orbax waits
for them, and merges what they wrote.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_fn.checkpoint.arrays_by_name import nested
from llama_fn.checkpoint.integrity import of_json, seal, unreadable
from llama_fn.checkpoint.layout import Stored
from llama_fn.checkpoint.quiet import quieten_orbax
from llama_fn.errors import UserError
from llama_fn.model.arrays import describe

log = logging.getLogger("llama_fn.checkpoint")
# Orbax gives a save 20 minutes by the wall clock. A slow disk takes longer, and a clock that is set may use them up at
# once. How long a save may take is for the watchdog to say, which counts signs of life.
NEVER_S = 365 * 24 * 3600


@dataclass(frozen=True)
class SavedStep:
    """A good checkpoint, or a `local` copy (local.py): its iteration, and all that it holds besides the arrays."""

    step: int
    meta: dict[str, Any]
    local: bool = False


class Checkpoints:
    """Those of a run, in `folder`. Keeps the newest `keep_latest`, and every `keep_every`-th.

    Importing Orbax takes a second, as it imports jax. So it waits for the first save, unless an earlier process left
    something behind that Orbax removes.
    """

    def __init__(self, folder: Path, keep_latest: int, keep_every: int) -> None:
        self.folder, self.keep = folder.absolute(), (keep_latest, keep_every)
        self.writing: list[Callable[[Path], None]] = []  # what writes the arrays of the save under way
        if _others(self.folder):
            self.manager.reload()

    @cached_property
    def manager(self) -> Any:
        """Orbax's own."""
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # orbax imports jax, which must not take an accelerator
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        from llama_fn.checkpoint.orbax_leaves import registry

        quieten_orbax()
        latest, every = self.keep
        keep: list[Any] = [policies.LatestN(latest), *([policies.EveryNSteps(every)] if every else [])]
        state = ocp.PyTreeCheckpointHandler(
            use_zarr3=True, use_compression=False, type_handler_registry=registry(lambda at: self.writing[-1](at))
        )
        return ocp.CheckpointManager(
            self.folder,
            item_handlers={"state": state, "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(timeout_secs=NEVER_S),
            ),
        )

    def begin(
        self, step: int, arrays: Mapping[str, Stored], meta: dict[str, Any], write: Callable[[Path], None]
    ) -> None:
        """Start writing iteration `step`: `write(folder)` is called in a thread, and returns when all processes have
        written their parts of `arrays` there."""
        manager = self.manager
        from orbax.checkpoint import args

        from llama_fn.checkpoint.orbax_leaves import Leaf

        meta = {**meta, "arrays": {path: describe(array) for path, array in arrays.items()}}
        meta["crc32"] = of_json(meta)
        self.writing[:] = [write]
        leaves = {path: Leaf(array.shape, array.dtype) for path, array in arrays.items()}
        items = args.Composite(state=args.PyTreeSave(nested(leaves)), meta=args.JsonSave(meta))
        manager.save(step, args=items, force=True)

    def commit(self, step: int) -> None:
        """Until iteration `step` is complete, and sealed."""
        self.manager.wait_until_finished()
        seal(self.folder / str(step))

    def failed(self, step: int, error: Exception) -> str:
        """What to say of a save that failed."""
        self._look_again()
        kept = self.steps()
        free = shutil.disk_usage(self.folder).free
        reason = "No space left on device" if "os_error_code='28'" in str(error) else str(error)[:300]
        if not of_disk(error):
            reason = f"{type(error).__name__}: {reason}"
        return (
            f"the checkpoint of iteration {step} could not be written to {self.folder} "
            f"({free / 1e6:.1f} MB free): {reason}. Complete checkpoints there: {len(kept)}, the newest "
            f"{kept[-1] if kept else 'none'}"
        )

    def steps(self) -> list[int]:
        """Iterations of the checkpoints there are, oldest first."""
        if self._has_manager:
            return sorted(self.manager.all_steps())
        return sorted(int(entry.name) for entry in os.scandir(self.folder) if _is_named(entry))

    @property
    def _has_manager(self) -> bool:
        return "manager" in self.__dict__

    def _look_again(self) -> None:
        """Let Orbax see what others did in the folder."""
        if self._has_manager:
            self.manager.reload()

    def set_aside(self, step: int) -> None:
        """Move a checkpoint that is damaged out of the way; UserError where that cannot be done."""
        source, damaged = self.folder / str(step), self.folder.parent / "damaged"
        names = (f"{step}.damaged{f'.{n}' if n else ''}" for n in itertools.count())
        try:
            damaged.mkdir(exist_ok=True)
            os.rename(source, next(path for name in names if not (path := damaged / name).exists()))
        except OSError as error:
            raise UserError(
                f"{source} is damaged and cannot be moved to {damaged}: {error.strerror}. Move it away by hand to "
                "go on from the one before"
            ) from None
        self._look_again()

    def refuse_other_arrays(self, saved_step: SavedStep, wanted: Mapping[str, str]) -> None:
        """UserError with the paths whose shape or dtype is not the `wanted` one."""
        saved = saved_step.meta["arrays"]
        lines = [
            f"  state.{path}: saved {saved.get(path, 'nothing')}, needed {wanted.get(path, 'nothing')}"
            for path in [*wanted, *(p for p in saved if p not in wanted)]
            if saved.get(path) != wanted.get(path)
        ]
        if lines:
            more = [f"  ... and {len(lines) - 20} more"] if lines[20:] else []
            raise UserError(
                f"{self.folder / str(saved_step.step)} holds the state of another model or optimizer:\n"
                + "\n".join([*lines[:20], *more])
                + "\nRestore the flags, or name another --run.workdir. Nothing was moved"
            )

    def close(self) -> None:
        """Let go of Orbax."""
        if self._has_manager:
            self.manager.close()


def _is_named(entry: os.DirEntry[str]) -> bool:
    """Whether something is named as a checkpoint is."""
    return entry.name.isascii() and entry.name.isdigit()


def _others(folder: Path) -> bool:
    """Whether a folder of checkpoints holds anything else. UserError for one that cannot be listed, or that names a
    checkpoint which is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise unreadable(folder, error) from None
    for entry in filter(_is_named, entries):
        if not entry.is_dir():
            what = f"a link to {os.readlink(entry.path)}, which is not there" if entry.is_symlink() else "no folder"
            raise UserError(f"checkpoint {entry.path} is {what}. Bring it back, or remove it to go on from another one")
    return not all(map(_is_named, entries))


def of_disk(error: Exception) -> bool:
    """Whether an error of a save is the disk's, which says so in words, and not a fault, which needs its traceback."""
    return isinstance(error, OSError) or "os_error_code" in str(error)
