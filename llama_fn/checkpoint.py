"""Checkpoints through Orbax: asynchronous, atomic, verified, readable by plain JAX.

A checkpoint of iteration i is folder i with the items `state` (nested dicts of arrays named by tree path) and `meta`
(JSON: iterator state, config, checksum of every array). Orbax writes into a temporary folder and renames it, so a
checkpoint that can be seen is complete; checksums catch what the disk did to it afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from llama_fn import tree
from llama_fn.arrays import describe
from llama_fn.errors import UserError

log = logging.getLogger("llama_fn.checkpoint")


def _to_numpy(t: torch.Tensor) -> np.ndarray:
    """A view where t is on the CPU: Orbax copies host arrays itself before save() returns."""
    t = t.detach().to("cpu").contiguous()
    return t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if t.dtype is torch.bfloat16 else t.numpy()


def _to_torch(a: np.ndarray) -> torch.Tensor:
    a = np.ascontiguousarray(a) if a.ndim else np.asarray(a)
    return (
        torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
        if a.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(a)
    )


def _keys(path: str) -> list[str]:
    return [key for key in re.split(r"[.\[\]]+", path) if key]


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = _keys(path)
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested


def _find(nested: Any, path: str) -> Any:
    for key in _keys(path):
        nested = nested.get(key) if isinstance(nested, dict) else None
    return nested


def _checksum(a: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)


class Checkpointer:
    """Saves and restores (state, meta) in `folder`. Keeps the newest `keep_latest`, and every `keep_every`-th."""

    def __init__(self, folder: Path, keep_latest: int, keep_every: int) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # orbax imports jax, which must not take an accelerator
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        _quiet_orbax()
        keep: list[Any] = [policies.LatestN(keep_latest)]
        keep += [policies.EveryNSteps(keep_every)] if keep_every else []
        self.ocp, self.folder, self.saving = ocp, folder.absolute(), 0
        self.folder.mkdir(parents=True, exist_ok=True)
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
        arrays = {path: _to_numpy(leaf) for path, leaf in tree.by_path(state).items()}
        meta = {**meta, "checksums": {path: _checksum(a) for path, a in arrays.items()}}
        args = self.ocp.args
        items = args.Composite(state=args.PyTreeSave(_nest(arrays)), meta=args.JsonSave(meta))
        try:
            self.manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until everything is on disk; UserError if a save failed."""
        try:
            self.manager.wait_until_finished()
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
        return sorted(self.manager.all_steps())

    def meta(self, step: int) -> dict[str, Any]:
        restored = self.manager.restore(step, args=self.ocp.args.Composite(meta=self.ocp.args.JsonRestore()))
        return dict(restored["meta"])

    def restore_latest(self, abstract: Any, device: str) -> tuple[int, Any, dict[str, Any]] | None:
        """(iteration, state like `abstract`, meta) of the newest good checkpoint, or None where there is none.

        A damaged one is named, moved aside and passed over; UserError when none of several is good.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                meta = self.meta(step)
                return step, self._restore(step, abstract, meta, device), meta
            except Exception as error:
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                log.error("checkpoint %s is damaged (%s); trying the one before", self.folder / str(step), reason)
                self._set_aside(step)
        if steps:
            raise UserError(
                f"no checkpoint in {self.folder} can be restored (tried {steps[::-1]}; they were moved to ../damaged). "
                "Start in another --run.workdir, or bring back a copy"
            )
        return None

    def _set_aside(self, step: int) -> None:
        source = self.folder / str(step)
        target = self.folder.parent / "damaged" / f"{step}.damaged"
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(source, target)
        self.manager.reload()

    def _restore(self, step: int, abstract: Any, meta: dict[str, Any], device: str) -> Any:
        args = self.ocp.args
        nested = self.manager.restore(step, args=args.Composite(state=args.PyTreeRestore()))["state"]
        checksums = meta["checksums"]

        def leaf(path: str, info: Any) -> torch.Tensor:
            found = _find(nested, path)
            if found is None:
                raise ValueError(f"state.{path} is missing; expected {describe(info)}")
            array = np.asarray(found)
            if _checksum(array) != checksums.get(path):
                raise ValueError(f"state.{path} has another checksum than when it was saved")
            t = _to_torch(array)
            if tuple(t.shape) != info.shape or t.dtype != info.dtype:
                raise ValueError(f"state.{path} is {describe(t)}, this configuration needs {describe(info)}")
            return t.clone().to(device)

        return tree.map_with_path(leaf, abstract)

    def close(self) -> None:
        self.wait()
        self.manager.close()


def _quiet_orbax() -> None:
    """Keep orbax's INFO lines and its threads' tracebacks from the terminal; a failed save is told once, by us."""
    from absl import logging as absl_logging

    class OneLineWarnings(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if "orbax" in record.pathname:
                record.exc_info, record.exc_text = None, None
                return logging.WARNING <= record.levelno < logging.ERROR
            return True

    handler = absl_logging.get_absl_handler()
    if not any(type(f).__name__ == "OneLineWarnings" for f in handler.filters):
        handler.addFilter(OneLineWarnings())
