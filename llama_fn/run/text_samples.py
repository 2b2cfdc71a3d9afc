"""Text that the model writes while it is trained, to fixed prompts with a fixed seed: what a loss does not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_fn.compiler.stages import Lowered
from llama_fn.config import Config
from llama_fn.data.prepare import tokenizer_of
from llama_fn.data.vocabularies import Tokenizer
from llama_fn.errors import UserError
from llama_fn.run.decoding import Decoder, Sampling

TOKENS = 64
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def pieces_of(cfg: Config, workdir: Path) -> Tokenizer:
    """The tokenizer of the data; UserError where it is not known."""
    pieces = tokenizer_of(cfg, workdir)
    if pieces is None:
        raise UserError(
            f"--run.sample_every={cfg.run.sample_every} writes text, and --data.path={cfg.data.path} holds tokens: "
            "name their --data.tokenizer"
        )
    return pieces


class TextSamples:
    """`lowered`: the step, whose parameters are read; `options`: of the backend, for decoding."""

    def __init__(self, cfg: Config, pieces: Tokenizer, lowered: Lowered, options: dict[str, Any]) -> None:
        self.pieces, self.prompts = pieces, cfg.run.sample_prompts.split("|")
        # A document begins behind the end of another.
        self.ids = [[pieces.eos_id(), *pieces.encode(prompt)] for prompt in self.prompts]
        self.decoder = Decoder(
            cfg.model, max(map(len, self.ids)) + TOKENS, cfg.run.backend, lowered.mesh, lowered.rules, **options
        )

    def write(self, params: Any) -> list[tuple[str, str]]:
        """Prompts and what the model writes to them now. Every process calls it."""
        self.decoder.load(params)
        said: list[list[int]] = [[] for _ in self.ids]
        for tokens in self.decoder.generate(self.ids, SAMPLING, self.pieces.eos_id()):
            for answer, token in zip(said, tokens, strict=True):
                answer.append(token)
            if len(said[0]) == TOKENS:
                break
        self.decoder.unload()
        return list(zip(self.prompts, map(self.pieces.decode, said), strict=True))
