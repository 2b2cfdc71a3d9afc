"""Text from a model: of a run's work folder, of one of its checkpoints, or of converted weights.

    python -m llama_fn.tools.generate --source=work/tiny_cpu --prompt="def main():"
    python -m llama_fn.tools.generate --source=work/llama31_8b --file=prompts.txt --temperature=0.7 --top_p=0.9

    torchrun --nproc_per_node=2 -m llama_fn.tools.generate --mesh=model:2 --source=work/llama31_8b --prompt="Once"

One prompt is answered as the tokens come. Several (--prompt again, or a line each of --file) are answered together and
printed one after the other. Temperature 0 takes the likeliest token each time; a --seed makes the others repeatable.

Exit status 0, 2 for wrong input, 130 for Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_fn.errors import UserError
from llama_fn.tools import command, loading_flags

FLAGS = flags.FLAGS


def generate() -> int:
    """Print what the model says to each prompt."""
    prompts = [*FLAGS.prompt, *_lines()]
    if not FLAGS.source or not prompts:
        raise UserError("give --source, a work folder, and --prompt or --file")
    from llama_fn.config import RunConfig
    from llama_fn.run import decoding
    from llama_fn.tools import loading

    run = RunConfig(backend=FLAGS.backend, device=FLAGS.device)
    model = loading.load(Path(os.path.expanduser(FLAGS.source)), FLAGS.tokenizer, FLAGS.dtype, run, FLAGS.mesh)
    sampling = decoding.Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.seed)
    begin = model.begin(FLAGS.begin)
    ids = [[*([begin] if begin >= 0 else []), *model.pieces.encode(prompt)] for prompt in prompts]
    longest = max(map(len, ids))
    decoder = decoding.Decoder(
        model.cfg, longest + FLAGS.tokens, FLAGS.backend, model.mesh, **model.backend_options(FLAGS.backend)
    ).load(model.params)  # fmt: skip
    said: list[list[int]] = [[] for _ in prompts]
    alone = prompts[0] if len(prompts) == 1 and model.chief else None
    shown, began = _Shown(model.pieces, alone), time.perf_counter()
    steps = decoder.generate(ids, sampling, model.pieces.eos_id())
    for count, tokens in enumerate(steps, 1):
        for answer, token in zip(said, tokens, strict=True):
            if not answer or answer[-1] != model.pieces.eos_id():
                answer.append(token)
        shown.more(said[0])
        texts = [model.pieces.decode(answer) for answer in said] if FLAGS.stop else []
        if count == FLAGS.tokens or (texts and all(any(stop in text for stop in FLAGS.stop) for text in texts)):
            break
    shown.end()
    model.close()
    if not model.chief:
        return 0
    if len(prompts) > 1:
        for prompt, answer in zip(prompts, said, strict=True):
            print(f"--- {prompt}\n{_cut(model.pieces.decode(answer))}")
    seconds = time.perf_counter() - began
    print(f"{sum(map(len, said))} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    return 0


class _Shown:
    """One prompt's answer on the terminal, as it comes; nothing of several."""

    def __init__(self, pieces: Any, prompt: str | None) -> None:
        self.pieces, self.on, self.text = pieces, prompt is not None, ""
        if prompt is not None:
            print(prompt, end="", flush=True)

    def more(self, answer: Sequence[int]) -> None:
        text = _cut(self.pieces.decode(list(answer)))
        if self.on and not text.endswith("\ufffd"):  # half of a character
            print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def end(self) -> None:
        if self.on:
            print(flush=True)


def _cut(text: str) -> str:
    """Up to where a --stop begins."""
    return text[: min((text.index(stop) for stop in FLAGS.stop if stop in text), default=len(text))]


def _lines() -> list[str]:
    if not FLAGS.file:
        return []
    path = Path(os.path.expanduser(FLAGS.file))
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file={path} cannot be read: {error}") from None


def main(argv: list[str]) -> None:
    """The command: exit status 0, 2 or 130."""
    sys.exit(command.status_of(generate))


if __name__ == "__main__":
    loading_flags.define()
    flags.DEFINE_multi_string("prompt", [], "what the text begins with; may be given several times")
    flags.DEFINE_string("file", "", "file of prompts, a line each")
    flags.DEFINE_integer("tokens", 128, "how many to generate at most", 1)
    flags.DEFINE_float("temperature", 0.0, "0: the likeliest token each time", 0.0)
    flags.DEFINE_integer("top_k", 0, "draw among so many likeliest; 0: all", 0)
    flags.DEFINE_float("top_p", 1.0, "draw among the likeliest that have this probability together", 0.0, 1.0)
    flags.DEFINE_integer("seed", 0, "of the draws", 0)
    flags.DEFINE_multi_string("stop", [], "text at which an answer ends; may be given several times")
    flags.adopt_module_key_flags(loading_flags)
    app.run(main, flags_parser=command.parse)
