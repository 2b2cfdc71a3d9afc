"""Emergency copies: every few steps each process keeps its part of the state on its own machine, disk or memory.

They cost no shared file system, so they can be made much more often than checkpoints. With several machines each
process hands its copy on to the next machine, so that the loss of one loses nothing. A start takes the newest copy that
all processes have, where it is newer than every checkpoint; it needs the mesh that made it. Copies are removed once
newer ones are complete, and all of them at the end of a run, whose state is in a checkpoint then.

    DIR/RUN/STEP/RANK/      ocdbt.process_0 with the arrays, meta.json, and sums.json, which is written last
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llama_fn import progress, tree
from llama_fn.checkpoint import layout, tensors
from llama_fn.checkpoint.host_copy import HostCopy
from llama_fn.checkpoint.integrity import Damaged, check, is_sealed, seal
from llama_fn.checkpoint.layout import Stored
from llama_fn.checkpoint.orbax import SavedStep
from llama_fn.checkpoint.saving import SPARE_BYTES
from llama_fn.distributed import Processes, by_chief
from llama_fn.distributed.folders import Folders
from llama_fn.errors import SaidElsewhere, UserError
from llama_fn.files import atomic
from llama_fn.launch import launched
from sharding import Mesh

log = logging.getLogger("llama_fn.checkpoint")
META, MINE = "meta.json", 0
# What of the flags decides which process holds what.
LAYOUT = ("mesh.axes", "mesh.rules", "mesh.schedule", "mesh.chunks", "mesh.stage_layers")


def run_folder(directory: Path, workdir: Path, processes: Processes | None) -> Path:
    """The folder of this run among those of other runs, by a name that the work folder keeps."""

    def name() -> str:
        path = workdir / "local_copies"
        if not path.exists():
            with atomic(path) as f:
                f.write(uuid.uuid4().hex)
        return path.read_text().strip()

    return directory.absolute() / by_chief(processes, name)


class LocalCopies:
    """Those of a run, in `folder` of every machine; of several machines each hands its own to the next."""

    def __init__(self, folder: Path, processes: Processes | None) -> None:
        self.folder, self.processes = folder, processes
        self.rank, self.world = (processes.rank, processes.mesh.size) if processes else (0, 1)
        per_machine = launched().local_world
        self.folders = Folders() if self.world > per_machine else None
        self.next = (self.rank + per_machine) % self.world
        self.before = (self.rank - per_machine) % self.world
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="local-copy")
        self.pending: Future[None] | None = None
        self.host, self.count = HostCopy(), 0
        if self.folders is not None:
            self._refuse_shared()

    def _refuse_shared(self) -> None:
        """UserError where machines see one another's folder: then a copy would not outlive its machine's."""
        mark = self.folder / f".{uuid.uuid4().hex}"
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        marks = self._words(mark.name)
        words = self._words("shared" if (self.folder / marks[self.before]).exists() else "")
        mark.unlink(missing_ok=True)
        if any(words):
            error = f"--run.local_dir={self.folder.parent} is shared by machines. Name a folder of each one's own"
            raise UserError(error) if self.rank == 0 else SaidElsewhere(error)

    def newest(self, above: int, config: Mapping[str, Any], accept: Callable[[SavedStep], None]) -> SavedStep | None:
        """The newest that all processes have of an iteration `above` that of the newest checkpoint; None without.

        `config`: the flags of this start. UserError where `accept` raises it.
        """
        held = {step: self._ranks(step) for step in self._steps() if step > above}
        everyone = [{int(step): ranks for step, ranks in json.loads(word).items()}
                    for word in self._words(json.dumps(held))]  # fmt: skip
        for step in sorted(set().union(*everyone), reverse=True):
            holders = [_holder(rank, step, everyone) for rank in range(self.world)]
            if None in holders:
                continue
            wrong = self._brought(step, [holder for holder in holders if holder is not None])
            meta = json.loads((self._place(step) / META).read_bytes()) if not any(wrong) else {}
            if any(wrong):
                self._say("the local copy of iteration %d is not used: %s", step, next(filter(None, wrong)))
            elif others := [name for name in LAYOUT if meta["config"].get(name) != config[name]]:
                was = ", ".join(f"--{name}={meta['config'].get(name)}" for name in others)
                self._say("the local copy of iteration %d needs %s, so it is not used", step, was)
            else:
                saved = SavedStep(step, meta, local=True)
                by_chief(self.processes, lambda: accept(saved))  # noqa: B023
                return saved
        return None

    def _steps(self) -> list[int]:
        return [int(p.name) for p in self.folder.glob("*") if p.name.isascii() and p.name.isdigit()]

    def _ranks(self, step: int) -> list[int]:
        """Whose copies of a step this machine has, complete."""
        folders = (self.folder / str(step)).glob("*")
        return sorted(int(p.name) for p in folders if p.name.isascii() and p.name.isdigit() and is_sealed(p))

    def _place(self, step: int, rank: int | None = None) -> Path:
        return self.folder / str(step) / str(self.rank if rank is None else rank)

    def _brought(self, step: int, holders: Sequence[int]) -> list[str]:
        """Bring every copy to its process, and check it; what is wrong with each, "" for nothing."""
        wrong = ""
        try:
            for rank, holder in enumerate(holders):
                if holder != rank and self.folders is not None:
                    self._bring(step, rank, holder, self.folders)
            check(self._place(step))
        except (Damaged, OSError, RuntimeError, UserError) as error:
            wrong = f"process {self.rank}: {error}"
        return self._words(wrong)

    def _bring(self, step: int, rank: int, holder: int, folders: Folders) -> None:
        if self.rank == holder:
            folders.send(self._place(step, rank), rank)
        elif self.rank == rank:
            shutil.rmtree(self._place(step), ignore_errors=True)
            folders.receive(self._place(step), holder)

    def restore(self, step: int, infos: Any, parts: Mapping[str, Any], device: str) -> Any:
        """This process's part of the state; UserError where that is not what `parts` says."""
        reader = tensors.Reader(tensors.process_folder(self._place(step), MINE), zarr3=True)

        places = {path: i / len(parts) for i, path in enumerate(parts)}

        def leaf(path: str, info: Any) -> torch.Tensor:
            progress.say(places[path], path)
            shape = parts[path].shape
            if tuple(reader.array(path).shape) != shape:
                raise UserError(
                    f"{self._place(step)} holds {list(reader.array(path).shape)} of state.{path}, and this process "
                    f"needs {list(shape)}. Remove {self.folder} to go on from the newest checkpoint"
                )
            return reader.tensor(path, tuple(slice(0, size) for size in shape)).to(device)

        return tree.map_with_path(leaf, infos)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Copy this process's part, and write it beside the run. A copy that fails is said, and the run goes on."""
        self.wait()
        arrays = layout.stored(state, None, Mesh(), MINE)
        values = self.host.of(state, arrays)
        self.pending = self.thread.submit(self._save, step, arrays, values, meta)

    def _save(
        self, step: int, arrays: Mapping[str, Stored], values: Mapping[str, list[torch.Tensor]], meta: Mapping[str, Any]
    ) -> None:
        words = self._said(lambda: self._write(step, arrays, values, meta))
        if self.folders is not None and not any(words):
            words = self._said(lambda: self._hand_on(step))
        if any(words):
            why = "; ".join(f"process {rank}: {word}" for rank, word in enumerate(words) if word)
            self._say("no local copy of iteration %d: %s. The run goes on", step, why)
        # Of a step that failed nothing is worth keeping; of one that did not, nothing else is.
        for other in self._steps():
            if (other == step) == any(words):
                self._remove(other)

    def _said(self, what: Callable[[], None]) -> list[str]:
        """What went wrong with it, by process."""
        word = ""
        try:
            what()
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # all wait for a word
            word = str(error) or type(error).__name__
        return self._words(word)

    def _write(
        self, step: int, arrays: Mapping[str, Stored], values: Mapping[str, list[torch.Tensor]], meta: Mapping[str, Any]
    ) -> None:
        mine = self._place(step)
        shutil.rmtree(mine, ignore_errors=True)  # of an earlier timeline, or not complete
        mine.mkdir(parents=True)
        needed = layout.written_bytes(arrays) * (1 if self.folders is None else 2) + SPARE_BYTES
        if (free := shutil.disk_usage(mine).free) < needed:
            raise OSError(f"{self.folder} has {free / 1e6:.1f} MB free, and a copy takes {needed / 1e6:.1f} MB")
        tensors.process_folder(mine, MINE).mkdir()
        tensors.write(mine, MINE, arrays, values)
        with atomic(mine / META) as f:
            json.dump(meta, f)
        seal(mine)

    def _hand_on(self, step: int) -> None:
        assert self.folders is not None
        theirs = self._place(step, self.before)
        shutil.rmtree(theirs, ignore_errors=True)
        self.folders.exchange(self._place(step), self.next, theirs, self.before)

    def _remove(self, step: int) -> None:
        """What this process has written of a step."""
        for rank in {self.rank, self.before}:
            shutil.rmtree(self._place(step, rank), ignore_errors=True)
        for folder in (self.folder / str(step), self.folder):
            try:
                folder.rmdir()
            except OSError:  # not empty: others of this machine have theirs there
                return

    def _words(self, word: str) -> list[str]:
        """What every process says."""
        if self.processes is None:
            return [word]
        self.count += 1
        words = self.processes.words(f"local.{self.count}", word)
        self.processes.watchdog.forget(f"local.{self.count - 1}")  # all have read it who have spoken since
        return words

    def _say(self, text: str, *args: Any) -> None:
        if self.rank == 0:
            log.warning(text, *args)

    def wait(self) -> None:
        """Until nothing is being written here."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self, remove: bool) -> None:
        """Finish what is being written; `remove`: all of them, as a checkpoint holds what they do."""
        self.wait()
        self.thread.shutdown()
        for step in self._steps() if remove else ():
            self._remove(step)


def _holder(rank: int, step: int, everyone: Sequence[Mapping[int, Sequence[int]]]) -> int | None:
    """Which process's machine has a rank's copy: its own rather than another's; None where none has."""
    return next((p for p in [rank, *range(len(everyone))] if rank in everyone[p].get(step, ())), None)
