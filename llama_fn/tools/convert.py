"""Weights in and out: Hugging Face's safetensors to ours and back, bit for bit, one tensor at a time.

    python -m llama_fn.tools.convert --source=DIR --out=work/llama3_8b
    python -m llama_fn.tools.convert --source=work/run --out=DIR --to=huggingface

The first reads a folder of Hugging Face (LLaMA 1 to 3.x, Mistral without sliding window, dense Qwen 2 and 3) or of Meta
(params.json and consolidated.*.pth). It writes a work folder of one checkpoint: train with
--run.init_from=work/llama3_8b, whatever the mesh. The second reads a work folder, its newest checkpoint or the one that
is named (work/run/checkpoints/300), and writes what transformers and vLLM load. Memory is that of the largest tensor, a
few times. --dtype changes the numbers, and is said.

Exit status 0, or 2 for wrong input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.tools import command

FLAGS = flags.FLAGS


def convert() -> int:
    """Do what the flags ask for."""
    source, out = Path(os.path.expanduser(FLAGS.source)), Path(os.path.expanduser(FLAGS.out))
    if not FLAGS.source or not FLAGS.out:
        raise UserError("give --source and --out, two folders")
    if not source.is_dir():
        raise UserError(f"--source={source} is no folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out={out} is not empty: name a new folder")
    from llama_fn.tools import convert_in, convert_out

    if FLAGS.to == "ours":
        convert_in.convert(source, out, FLAGS.dtype)
    else:
        convert_out.convert(source, out, FLAGS.dtype or "bfloat16")
    return 0


def main(argv: list[str]) -> None:
    """The command: exit status 0 or 2."""
    sys.exit(command.status_of(convert))


if __name__ == "__main__":
    flags.DEFINE_string("source", "", "folder to read")
    flags.DEFINE_string("out", "", "folder to write, which must be empty or not there")
    flags.DEFINE_enum("to", "ours", ["ours", "huggingface"], "what to write")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"],
        "dtype to write; unless given: ours keeps what it reads, huggingface gets bfloat16",
    )  # fmt: skip
    app.run(main, flags_parser=command.parse)
