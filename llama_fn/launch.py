"""What the launcher says of this process in the environment, as torchrun does: which of how many it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from llama_fn.config_checks import whole_number
from llama_fn.errors import UserError


@dataclass(frozen=True)
class Launch:
    """Rank among all processes and among those of this machine; a process that nobody launched is the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def launched(environ: Mapping[str, str] = os.environ) -> Launch:
    """UserError for variables that are no numbers, that contradict one another, or of which some are missing. An empty
    variable counts as not set."""
    world = _number(environ, "WORLD_SIZE", 1)
    local_world = _number(environ, "LOCAL_WORLD_SIZE", 1)
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(n)] if world > 1 else []
    if missing:
        raise UserError(
            f"environment variable WORLD_SIZE={world} without {', '.join(missing)}: start all processes with torchrun, "
            "which sets them, or unset WORLD_SIZE for a run of one process"
        )
    rank, local_rank = _number(environ, "RANK", 0), _number(environ, "LOCAL_RANK", 0)
    for name, value, of, count in (("RANK", rank, "WORLD_SIZE", world), ("LOCAL_RANK", local_rank, "", 1 << 16)):
        if value >= count:
            raise UserError(
                f"environment variable {name}={value} with {of or 'the number of processes'} {count}: ranks go from 0 "
                f"to {count - 1}. Start with torchrun, or unset {name} for a run of one process"
            )
    if world > 1:
        _number({"MASTER_PORT": environ["MASTER_PORT"]}, "MASTER_PORT", 0)
    return Launch(rank, world, local_rank, max(1, local_world))


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip()
    value = whole_number(text) if text else default
    if value is None or (value == 0 and default == 1):
        raise UserError(f"environment variable {name}={text}: a number is expected, as torchrun sets it")
    return value


def local_device(count: int) -> int:
    """LOCAL_RANK, the device of this process on its machine; UserError where the machine has fewer."""
    local = launched().local_rank
    if local >= count:
        raise UserError(
            f"LOCAL_RANK={local}, but this machine shows {count} devices: start at most {count} processes on it "
            f"(torchrun --nproc_per_node={count}), or free hidden devices (ASCEND_RT_VISIBLE_DEVICES, "
            "CUDA_VISIBLE_DEVICES)"
        )
    return local
