"""Going on from a checkpoint: what it must have been made with, and where to begin without one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_fn import config_fields
from llama_fn.checkpoint import SavedStep, Store, layout
from llama_fn.checkpoint.weights import Weights
from llama_fn.compiler.stages import Lowered
from llama_fn.config import Config
from llama_fn.data.iterator import BatchIterator
from llama_fn.data.parts import Parts
from llama_fn.errors import UserError
from llama_fn.files import atomic
from llama_fn.hardware import total_bytes
from llama_fn.launch import launched
from llama_fn.model import arrays, random
from llama_fn.run.versions import versions
from sharding import Mesh

log = logging.getLogger("llama_fn.resume")


def meta(cfg: Config, mesh: Mesh, batches: BatchIterator, data: Parts) -> dict[str, Any]:
    """What a checkpoint says besides the state."""
    return {
        "iterator": batches.state(),
        "config": config_fields.flat(cfg, "saved"),
        "data": data.fingerprint,
        "arithmetic": _arithmetic(cfg, mesh),
    }


def _arithmetic(cfg: Config, mesh: Mesh) -> dict[str, Any]:
    """What the last digits of sums depend on beside the flags."""
    return {"device": cfg.run.device.split(":")[0], "threads": torch.get_num_threads(), "mesh": str(mesh)}


def refuse_changes(cfg: Config, checkpoint: SavedStep) -> None:
    """UserError when a checkpoint was made with flags that give other numbers."""
    saved = checkpoint.meta["config"]
    changed = {
        name: (saved.get(name), value)
        for name, value in config_fields.flat(cfg, "numbers").items()
        if saved.get(name) != value
    }
    if changed and not cfg.run.accept_changes:
        lines = [f"  --{name}: was {was!r}, now {now!r}" for name, (was, now) in changed.items()]
        raise UserError(
            f"--run.workdir={cfg.run.workdir} holds iteration {checkpoint.step} of a run with other flags:\n"
            + "\n".join(lines) + "\nGoing on would give other numbers. Restore the flags, name another "
            "--run.workdir, or accept the change, this once, with --run.accept_changes"
        )  # fmt: skip


def refuse_other_data(cfg: Config, checkpoint: SavedStep, data: Parts) -> None:
    """UserError when a checkpoint was made with data that held other tokens."""
    was, now = checkpoint.meta["data"], data.fingerprint
    if was != now and not cfg.run.accept_changes:
        raise UserError(
            f"--data.path={cfg.data.path} is not the data that iteration {checkpoint.step} of {cfg.run.workdir} "
            f"was trained on ({_described(was)}; now {_described(now)}). Bring it back, name another --run.workdir, or "
            "accept the change, this once, with --run.accept_changes"
        )


def _described(fingerprint: Mapping[str, Any]) -> str:
    """Of one source, or of each of a mixture."""
    one = "{sequences} documents, {tokens} tokens, CRC-32 {index_crc32:x}"
    if "sources" not in fingerprint:
        return one.format_map(fingerprint)
    return ", ".join(f"{{name}}: weight {{weight:g}}, {one}".format_map(each) for each in fingerprint["sources"])


def warn_of_other_digits(cfg: Config, mesh: Mesh, checkpoint: SavedStep) -> None:
    """A word where sums will be done in another order, which is allowed, and not bitwise the same."""
    was: Mapping[str, Any] = checkpoint.meta["arithmetic"]
    now = _arithmetic(cfg, mesh)
    changed = [f"{name} {was[name]} before, {now[name]} now" for name in now if was[name] != now[name]]
    if changed:
        log.warning("the last digits of the numbers will differ from an uninterrupted run's: %s", "; ".join(changed))


def restore_or_begin(cfg: Config, store: Store, checkpoint: SavedStep | None, lowered: Lowered) -> Any:
    """The state of the checkpoint, or of iteration 0."""
    if checkpoint is None:
        parts = store.parts(lowered.inputs)
        state = arrays.materialize(store.infos, random.key(cfg.run.seed), cfg.run.device, parts)
        if not cfg.run.init_from:
            log.info("beginning at iteration 0 with seed %d", cfg.run.seed)
            return state
        weights = Weights(Path(cfg.run.init_from), "--run.init_from")
        held = layout.parts(store.infos.params, lowered.inputs[1:] if parts else None, store.mesh, store.rank)
        log.info("beginning at iteration 0 with the weights of %s; the optimizer begins anew", weights.folder)
        return replace(state, params=weights.load(store.infos.params, held, cfg.run.device))
    state = store.restore(checkpoint, lowered.inputs)
    where = f"the local copies in {store.local.folder}" if store.local and checkpoint.local else store.folder
    log.info("resuming from iteration %d of %s", checkpoint.step, where)
    return state


def refuse_too_large(cfg: Config, lowered: Lowered) -> None:
    """UserError where the state alone is more than this machine's memory, before anything is compiled for it."""
    needed, memory = lowered.argument_bytes * launched().local_world, total_bytes()
    if cfg.run.backend == "interpret":
        needed *= lowered.mesh.size
    if cfg.run.device.startswith("cpu") and needed > memory:
        raise UserError(
            f"parameters, moments and batch take {needed / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB: "
            "choose a smaller --model.preset, or more machines (python -m llama_fn.tools.plan says how many)"
        )


def save_flags(workdir: Path, cfg: Config, flags_text: str) -> None:
    """Write config.json and flags.txt of the work folder."""
    with atomic(workdir / "config.json") as f:
        json.dump({**config_fields.flat(cfg, "saved"), "versions": versions()}, f, indent=1)
    with atomic(workdir / "flags.txt") as f:
        f.write(flags_text)


def starting_point(checkpoint: SavedStep | None) -> tuple[int, int, int]:
    """Iterations done, samples and tokens consumed."""
    if checkpoint is None:
        return 0, 0, 0
    position = checkpoint.meta["iterator"]
    return checkpoint.step, position["consumed_samples"], position["consumed_tokens"]
