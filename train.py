"""Pre-train a LLaMA as one compiled graph.

    python train.py --flagfile=configs/tiny_cpu.flags
    python train.py --model.preset=llama_60m --model.compute_dtype=bf16 --data.path=my_text/ --run.workdir=work/mine

Every flag is a field of a section of llama_fn/config.py. --model.preset sets the shape, other --model flags change
single values of it. A run resumes what its --run.workdir holds. Exit statuses: docs/stopping.md.
"""

from __future__ import annotations

import gc
from pathlib import Path

from absl import app, flags

from llama_fn.compiler.garbage import uncollected
from llama_fn.config_checks import resolved
from llama_fn.errors import UserError
from llama_fn.tools import command, config_flags
from llama_fn.tools.config_flags import build_config, define_flags, flags_text, parse


def train(argv: list[str]) -> int:
    """Train as the flags say; the exit status (docs/stopping.md)."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --section.name=value")
    cfg = resolved(build_config())
    with uncollected():  # imports make half a million objects, none of which becomes garbage
        from llama_fn.operations.conclusion import concluded  # torch, only once the flags are known to be right
        from llama_fn.run import loop
    gc.freeze()
    with concluded(Path(cfg.run.workdir)):
        return loop.run(cfg, flags_text())


def main(argv: list[str]) -> None:
    """The command."""
    command.leave(command.status_of(lambda: train(argv)))


if __name__ == "__main__":
    define_flags()
    flags.adopt_module_key_flags(config_flags)  # so that --help lists them
    app.run(main, flags_parser=parse)
