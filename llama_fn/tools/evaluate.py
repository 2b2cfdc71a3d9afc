"""The perplexity of a model on texts or Megatron's .bin/.idx, one line for each.

    python -m llama_fn.tools.evaluate --source=work/llama31_8b --path=wiki.txt --path=code.jsonl --seq_len=2048

Text is tokenized as training does: each document ends with the end-of-sequence token. The tokens are read in windows of
--seq_len, one after the other, and every token but the first is predicted once.

    python -m llama_fn.tools.evaluate --source=work/llama31_8b --tasks=arc_easy,hellaswag --shots=5 --json=scores.json
    torchrun --nproc_per_node=8 -m llama_fn.tools.evaluate --mesh=model:8 --source=work/llama_65b --path=wiki.txt

--tasks asks the questions of lm-evaluation-harness (extra `eval`), of which lm_eval fetches the data where it is not on
this machine; --task_folder names a folder of your own tasks.

Exit status 0, or 2 for wrong input.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.files import atomic, temporary_folder
from llama_fn.tools import command, loading_flags

FLAGS = flags.FLAGS


def evaluate() -> int:
    """Print loss and perplexity of each --path, or the scores of --tasks."""
    if not FLAGS.source or not (FLAGS.path or FLAGS.tasks):
        raise UserError(
            "give --source, a work folder, and --path, a text or PREFIX of PREFIX.bin/.idx, or --tasks of lm_eval"
        )
    if FLAGS.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm_eval: pip install 'llama_fn[eval]'")
    from llama_fn.config import RunConfig
    from llama_fn.tools import loading

    run = RunConfig(eval_every=0, backend=FLAGS.backend, device=FLAGS.device)
    model = loading.load(Path(os.path.expanduser(FLAGS.source)), FLAGS.tokenizer, FLAGS.dtype, run, FLAGS.mesh)
    found: dict[str, Any] = {"source": str(model.weights.folder)}
    if FLAGS.path:
        found["paths"] = _perplexities(model, run)
    if FLAGS.tasks:
        found["tasks"] = _scores(model)
    if FLAGS.json and model.chief:
        with atomic(Path(FLAGS.json)) as f:
            json.dump(found, f, indent=1)
    model.close()
    return 0


def _scores(model: Any) -> dict[str, Any]:
    """Of each of --tasks, as lm_eval counts them."""
    from llama_fn.run.decoding import Decoder
    from llama_fn.tools import harness

    decoder = Decoder(model.cfg, FLAGS.seq_len, FLAGS.backend, model.mesh, **model.backend_options(FLAGS.backend))
    quiet = not (sys.stderr.isatty() and model.chief)
    asked = harness.Harness(model, decoder.load(model.params), FLAGS.batch, model.begin(FLAGS.begin), quiet)
    tasks = harness.results(asked, FLAGS.tasks, FLAGS.task_folder, FLAGS.shots, FLAGS.limit)
    for task, scores in tasks.items() if model.chief else ():
        for metric, value in scores.items():
            if isinstance(value, float) and "stderr" not in metric:
                print(f"{task}: {metric.removesuffix(',none')} {value:.6f}", flush=True)
    return tasks


def _perplexities(model: Any, run: Any) -> dict[str, Any]:
    """Of each --path."""
    from llama_fn.config import Config, DataConfig

    data = DataConfig(
        tokenizer=str(model.tokenizer), seq_len=FLAGS.seq_len, global_batch_size=FLAGS.batch, split="1,0,0",
        jsonl_key=FLAGS.jsonl_key,
    )  # fmt: skip
    cfg = Config(model=model.cfg, data=data, run=run)
    found = {}
    step = _compiled(cfg, model)
    for path in FLAGS.path:
        loss, tokens = _loss(replace(cfg, data=replace(data, path=os.path.expanduser(path))), model, step)
        found[path] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
        if model.chief:
            print(f"{path}: loss {loss:.6f}, perplexity {found[path]['perplexity']:.3f}, {tokens} tokens", flush=True)
    return found


def _compiled(cfg: Any, model: Any) -> Any:
    from llama_fn.planner import config_stages
    from sharding.rules import decoding

    lowered = config_stages.evaluation(cfg).lower(model.mesh, decoding(model.mesh))
    return lowered.compile(FLAGS.backend, **model.backend_options(FLAGS.backend))


def _loss(cfg: Any, model: Any, step: Any) -> tuple[float, int]:
    """Mean nats per token, and of how many."""
    from rich.progress import track

    from llama_fn.data.parts import open_parts

    logging.getLogger("llama_fn.data").setLevel(logging.ERROR)  # it warns of parts that a short text leaves empty
    tokens = open_parts(cfg, temporary_folder("llama_fn_evaluate_")).data.tokens
    if len(tokens) < 2:
        raise UserError(f"--path={cfg.data.path} has {len(tokens)} tokens; the second is the first that is predicted")
    per_batch = cfg.data.global_batch_size * cfg.data.seq_len
    batches, total = -(-(len(tokens) - 1) // per_batch), 0.0
    bar = track(_batches(tokens, cfg), cfg.data.path, batches, disable=not (sys.stderr.isatty() and model.chief))
    for batch in bar:
        total += step(model.params, batch).item() * float(batch.loss_mask.sum())
    return total / (len(tokens) - 1), len(tokens) - 1


def _batches(tokens: Any, cfg: Any) -> Iterator[Any]:
    """Windows one after the other; what the last batch has too much counts nothing."""
    import numpy as np
    import torch

    from llama_fn.model import train_step

    size, length = cfg.data.global_batch_size, cfg.data.seq_len
    for start in range(0, len(tokens) - 1, size * length):
        held = np.asarray(tokens[start : start + size * length + 1], np.int64)
        ids = np.zeros(size * length + 1, np.int64)
        ids[: len(held)] = held
        mask = (np.arange(size * length) < len(held) - 1).astype(np.float32)
        given = [torch.from_numpy(x.reshape(1, size, length).copy()) for x in (ids[:-1], ids[1:], mask)]
        yield train_step.Batch(*(x.to(cfg.run.device) for x in given))


def main(argv: list[str]) -> None:
    """The command: exit status 0 or 2."""
    sys.exit(command.status_of(evaluate))


if __name__ == "__main__":
    loading_flags.define()
    flags.DEFINE_multi_string("path", [], "text, .jsonl, folder of text, or PREFIX; may be given several times")
    flags.DEFINE_string("jsonl_key", "text", "field of a .jsonl line that holds the text")
    flags.DEFINE_integer("seq_len", 2048, "tokens of a window", 1)
    flags.DEFINE_integer("batch", 1, "windows, or answers of --tasks, at a time", 1)
    flags.DEFINE_list("tasks", [], "of lm_eval")
    flags.DEFINE_string("task_folder", None, "folder of .yaml files with tasks of your own")
    flags.DEFINE_integer("shots", None, "examples before each question; by default what the task says", 0)
    flags.DEFINE_integer("limit", None, "questions of each task; by default all", 1)
    flags.DEFINE_string("json", "", "file that gets the numbers as well")
    flags.adopt_module_key_flags(loading_flags)
    app.run(main, flags_parser=command.parse)
