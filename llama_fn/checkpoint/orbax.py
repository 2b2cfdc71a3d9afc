"""Checkpoints through Orbax: asynchronous, atomic, verified, readable by plain JAX.

A checkpoint of iteration i is folder i with the items `state` (nested dicts of arrays named by tree path) and `meta`
(JSON: iterator state, config, and of every array shape, dtype and checksum). Orbax writes into a temporary folder and
renames it, so a checkpoint that can be seen is complete; integrity.py tells what the disk did to it afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_fn import tree
from llama_fn.checkpoint.arrays_by_name import array_checksum, at_path, nested, to_numpy, to_torch
from llama_fn.checkpoint.integrity import Damaged, is_whole, of_json, seal, unreadable
from llama_fn.checkpoint.quiet import quieten_orbax
from llama_fn.errors import UserError
from llama_fn.model.arrays import describe

log = logging.getLogger("llama_fn.checkpoint")


@dataclass(frozen=True)
class SavedStep:
    """A good checkpoint: its iteration, and all that it holds besides the arrays."""

    step: int
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores (state, meta) in `folder`. Keeps the newest `keep_latest`, and every `keep_every`-th."""

    def __init__(self, folder: Path, keep_latest: int, keep_every: int) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # orbax imports jax, which must not take an accelerator
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        quieten_orbax()
        keep: list[Any] = [policies.LatestN(keep_latest)]
        keep += [policies.EveryNSteps(keep_every)] if keep_every else []
        self.ocp, self.folder, self.saving = ocp, folder.absolute(), 0
        self.commits = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.commit: Future[None] | None = None
        _usable(self.folder)
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
            ),
        )

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Start writing iteration `step`; returns once the state is copied. UserError if the one before failed."""
        self.wait()
        self.saving = step
        arrays = {path: to_numpy(leaf) for path, leaf in tree.by_path(state).items()}
        described = {path: [describe(leaf), array_checksum(arrays[path])] for path, leaf in tree.by_path(state).items()}
        meta = {**meta, "arrays": described}
        meta["crc32"] = of_json(meta)
        args = self.ocp.args
        items = args.Composite(state=args.PyTreeSave(nested(arrays)), meta=args.JsonSave(meta))
        try:
            self.manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._failed(error) from error
        self.commit = self.commits.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self.manager.wait_until_finished()
        seal(self.folder / str(step))

    def wait(self) -> None:
        """Until everything is on disk; UserError if a save failed."""
        commit, self.commit = self.commit, None
        try:
            if commit is not None:
                commit.result()
        except Exception as error:
            raise self._failed(error) from error

    def settle(self) -> None:
        """Wait for a save under way, whatever becomes of it: for a run that ends with another error."""
        with contextlib.suppress(UserError):
            self.wait()

    def _failed(self, error: Exception) -> UserError:
        self.manager.reload()
        kept = self.steps()
        free = shutil.disk_usage(self.folder).free
        reason = "No space left on device" if "os_error_code='28'" in str(error) else str(error)[:300]
        return UserError(
            f"the checkpoint of iteration {self.saving} could not be written to {self.folder} "
            f"({free / 1e6:.1f} MB free): {reason}. Complete checkpoints there: {len(kept)}, the newest "
            f"{kept[-1] if kept else 'none'}. Free some space and start the same command again"
        )

    def steps(self) -> list[int]:
        """Iterations of the checkpoints there are, oldest first."""
        return sorted(self.manager.all_steps())

    def find(self) -> SavedStep | None:
        """The newest good checkpoint, or None where there is none. One that is proven to be damaged is named, moved
        aside and passed over.

        UserError where none of several is good, and where one cannot be read: then nothing is touched.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return SavedStep(step, self._proven(step))
            except Damaged as damage:
                log.error("checkpoint %s is damaged (%s); trying the one before", self.folder / str(step), damage)
                self._set_aside(step)
        if steps:
            raise UserError(
                f"no checkpoint in {self.folder} can be restored (tried {steps[::-1]}; they were moved to ../damaged). "
                "Start in another --run.workdir, or bring back a copy"
            )
        return None

    def _proven(self, step: int) -> dict[str, Any]:
        """The meta of a checkpoint that is whole: by the sums of its files or, where the process ended before these
        were written, by those of its arrays."""
        folder = self.folder / str(step)
        listed = is_whole(folder)
        meta = self._meta(step)
        if not listed:
            arrays = self._arrays(step)
            for path, (_, crc) in meta["arrays"].items():
                if (array := at_path(arrays, path)) is None or array_checksum(np.asarray(array)) != crc:
                    raise Damaged(f"state.{path} has another checksum than when it was saved")
            seal(folder)
        return meta

    def _meta(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / "meta" / "metadata"
        try:
            meta = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise Damaged("meta/metadata is missing") from None
        except ValueError:  # not JSON, not even text
            raise Damaged("meta/metadata is not JSON") from None
        except OSError as error:
            raise unreadable(path, error) from None
        if not isinstance(meta, dict) or meta.pop("crc32", None) != of_json(meta):
            raise Damaged("meta/metadata has another checksum than when it was saved")
        return meta

    def _arrays(self, step: int) -> Any:
        """The state as Orbax gives it. UserError where it does not: its reasons are many, and few prove damage."""
        args = self.ocp.args
        try:
            return self.manager.restore(step, args=args.Composite(state=args.PyTreeRestore()))["state"]
        except MemoryError:
            raise
        except Exception as error:  # orbax, tensorstore and jax each have their own
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be read ({reason}), which does not prove that it is "
                "damaged, so nothing was moved. Start again once the cause is gone, or move that folder away to go on "
                "from the one before"
            ) from error

    def _set_aside(self, step: int) -> None:
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
        self.manager.reload()

    def restore(self, saved_step: SavedStep, abstract: Any, device: str) -> Any:
        """The state of a checkpoint, like `abstract`; UserError naming every leaf that it has otherwise."""
        self.refuse_other_arrays(saved_step, abstract)
        arrays = self._arrays(saved_step.step)

        def leaf(path: str, info: Any) -> torch.Tensor:
            array = np.asarray(at_path(arrays, path))
            if array_checksum(array) != saved_step.meta["arrays"][path][1]:
                raise UserError(
                    f"state.{path} is not what was saved, though the files of {self.folder / str(saved_step.step)} "
                    "are: the memory of this machine, or a library, changed it. Nothing was moved; try again"
                )
            return to_torch(array).clone().to(device)

        return tree.map_with_path(leaf, abstract)

    def refuse_other_arrays(self, saved_step: SavedStep, abstract: Any) -> None:
        """UserError with the paths whose shape or dtype is not that of `abstract`."""
        saved = {path: text for path, (text, _) in saved_step.meta["arrays"].items()}
        wanted = {path: describe(info) for path, info in tree.by_path(abstract).items()}
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
        """Wait for what is being written, then let go of Orbax."""
        self.wait()
        self.commits.shutdown()
        self.manager.close()


def _usable(folder: Path) -> None:
    """UserError for a folder of checkpoints that cannot be listed, or that names one which is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = [entry for entry in os.scandir(folder) if entry.name.isascii() and entry.name.isdigit()]
    except OSError as error:
        raise unreadable(folder, error) from None
    for entry in entries:
        if not entry.is_dir():
            what = f"a link to {os.readlink(entry.path)}, which is not there" if entry.is_symlink() else "no folder"
            raise UserError(f"checkpoint {entry.path} is {what}. Bring it back, or remove it to go on from another one")
