"""Raw corpora to Megatron's token files, and what can be done with those.

    python -m llama_fn.tools.preprocess corpus/ a.jsonl.zst "web/*.parquet" --tokenizer=tokenizer.model --out=data/web
    python -m llama_fn.tools.preprocess inspect data/web --tokenizer=tokenizer.model --document=3
    python -m llama_fn.tools.preprocess verify data/web data/books
    python -m llama_fn.tools.preprocess merge data/a data/b --out=data/both
    python -m llama_fn.tools.preprocess split data/web --weights=949,50,1 --out=data/web

Reads text, .json, .jsonl, .csv, .parquet, .arrow (folders of Hugging Face's datasets too), plain or as .gz, .xz or
.zst, from files, folders and patterns, in the order in which they are given and by name within. Writes OUT.bin and
OUT.idx, the same bytes whatever --workers. Started again after Ctrl-C or a kill, it goes on where it was.

    python -m llama_fn.tools.preprocess /shared/crawl --tokenizer=tokenizer.model --out=/shared/data/crawl \
        --executor=slurm --tasks=500 --partition=cpu --time=12:00:00 --sbatch=account=llm

--executor shares the files out over tasks, which datatrove runs on this machine or under SLURM (extra `cluster`).

Exit status 0, 2 for wrong input, 130 for Ctrl-C.
"""

from __future__ import annotations

import sys

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.tools import command

FLAGS = flags.FLAGS
ACTIONS = ("inspect", "verify", "merge", "split")


def preprocess(argv: list[str]) -> int:
    """Do what the words after the command say."""
    action, *rest = argv[1:] or [""]
    if not action or (action in ACTIONS and not rest):
        raise UserError("name files, folders or patterns to tokenize, or inspect, verify, merge or split and prefixes")
    if not FLAGS.out and action not in ("inspect", "verify"):
        raise UserError("give --out, the PREFIX of PREFIX.bin and PREFIX.idx")
    from llama_fn.tools import preprocess_text, preprocess_tokens

    if action in ACTIONS:
        return preprocess_tokens.run(action, rest)
    return preprocess_text.run(argv[1:])


def main(argv: list[str]) -> None:
    """The command: exit status 0, 2 or 130."""
    sys.exit(command.status_of(lambda: preprocess(argv)))


if __name__ == "__main__":
    flags.DEFINE_string("out", "", "PREFIX of what is written")
    flags.DEFINE_string("tokenizer", "", "tokenizer.model or tokenizer.json")
    flags.DEFINE_string("jsonl_key", "text", "field or column that holds the text; a.b for b within a")
    flags.DEFINE_integer("workers", 0, "processes; 0: one for each core", 0)
    flags.DEFINE_bool("eos", True, "end each document with the tokenizer's end token")
    flags.DEFINE_bool("bos", False, "begin each document with the tokenizer's first token")
    flags.DEFINE_enum(
        "errors", "error", ["error", "replace", "skip"],
        "bytes that are not UTF-8: an error, U+FFFD in their place, or the document is left out; counted",
    )  # fmt: skip
    flags.DEFINE_enum("executor", "", ["", "local", "slurm"], "share the files out over tasks, here or under SLURM")
    flags.DEFINE_integer("tasks", 8, "executor: how many; --workers of them at a time, under SLURM all by default", 1)
    flags.DEFINE_string("partition", "", "executor=slurm: partition of the tasks")
    flags.DEFINE_string("time", "24:00:00", "executor=slurm: limit of a task")
    flags.DEFINE_multi_string("sbatch", [], "executor=slurm: KEY=VALUE for sbatch; may be given several times")
    flags.DEFINE_integer("document", -1, "inspect: show the text of this document", -1)
    flags.DEFINE_integer("vocab_size", 0, "verify: tokens are below this; 0: below the tokenizer's, if one is given", 0)
    flags.DEFINE_string("weights", "949,50,1", "split: of OUT_train, OUT_valid and OUT_test")
    app.run(main, flags_parser=command.parse)
