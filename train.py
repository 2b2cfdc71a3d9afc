"""Pre-train a LLaMA as one compiled graph.

    python train.py --flagfile=configs/tiny_cpu.flags
    python train.py --model.preset=llama_60m --model.compute_dtype=bf16 --data.path=my_text/ --run.workdir=work/mine

Every flag is a field of a section of llama_fn/config.py. --model.preset sets the shape, other --model flags change
single values of it. A run resumes what its --run.workdir holds.
"""

from __future__ import annotations

import os
import sys
import typing

from absl import app, flags

from llama_fn import config
from llama_fn.errors import FULL_DISK, UserError
from llama_fn.tools import config_flags
from llama_fn.tools.config_flags import build_config, define_flags, flags_text, parse


def main(argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; flags are written --section.name=value")
        cfg = config.validate(build_config())
        from llama_fn import loop  # torch is imported only once the flags are known to be right

        sys.exit(loop.run(cfg, flags_text()))
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        fail(f"{error}: free some space and start the same command again")
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing to save", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> typing.NoReturn:
    """Say what is wrong and leave with status 2, at once: the run has closed its files, and on a full disk the threads
    of its libraries would go on reporting it with tracebacks."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)


if __name__ == "__main__":
    define_flags()
    flags.adopt_module_key_flags(config_flags)  # so that --help lists them
    app.run(main, flags_parser=parse)
