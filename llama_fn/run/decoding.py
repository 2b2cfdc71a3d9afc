"""Text from weights: prompts are read at once, then one token of each row after the other, both compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llama_fn import tree
from llama_fn.compiler import kept, stages
from llama_fn.compiler.backends import code_cache
from llama_fn.config import ModelConfig
from llama_fn.errors import UserError
from llama_fn.model import decode, llama, stored
from llama_fn.model.arrays import DTYPES, ArrayInfo, describe
from llama_fn.run import kept_steps
from sharding import Mesh, P, constrain
from sharding.rules import Rules, decoding

BUCKET = 64  # prompts are padded to a multiple, so that one compilation serves many


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else from the `top_k` likeliest (0: all) among those that
    together have the probability `top_p`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Decoder:
    """A model that generates, on one device or sharded over the axis `model` of a mesh, all of whose processes call it
    alike. `length`: of prompt and text together, at most. `rules`: that the parameters which `load` is given are laid
    out by, by default those of decoding. `options`: of the backend.
    """

    def __init__(
        self, cfg: ModelConfig, length: int, backend: str = "inductor", mesh: Mesh | None = None,
        rules: Rules | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.cfg, self.length, self.backend, self.options = cfg, length, backend, options
        self.mesh, self.rules, self.kind = mesh or Mesh(), rules, DTYPES[cfg.compute_dtype]
        self.infos = tree.map(lambda x: replace(x, dtype=self.kind, stays=True), stored.infos(cfg))
        self.compiled: dict[Any, stages.Compiled] = {}
        self.params: llama.Params | None = None

    def load(self, params: llama.Params) -> Decoder:
        """Generate from these, as a checkpoint has them: this process's part where it is one of several. Returns
        itself."""
        moved = self.rules is not None and self.mesh.size > 1
        held = self._move()(params) if moved else tree.map(lambda x: x.to(self.kind), params)
        self.params = stored.turned(held, self.cfg)
        self.device = tree.leaves(self.params)[0].device
        return self

    def unload(self) -> None:
        """Let go of the memory."""
        self.params = None

    def _move(self) -> stages.Compiled:
        """What brings parameters into the layout of decoding."""
        if "move" not in self.compiled:
            assert self.rules is not None
            rules = replace(decoding(self.mesh), params=self.rules.params, moments=self.rules.moments)

            infos = llama.abstract_params(self.cfg)

            def move(params: llama.Params) -> Any:
                return tree.map(lambda x, info: constrain(x.to(self.kind), P(*info.axes)), params, infos)

            # Nothing to fuse: not worth a compilation.
            backend = "interpret" if self.backend == "interpret" else "eager"
            options = {name: value for name, value in self.options.items() if name == "processes"}
            lowered = stages.jit(move).trace(infos).lower(self.mesh, rules)
            self.compiled["move"] = lowered.compile(backend, **options)
        return self.compiled["move"]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: int = -1) -> Iterator[list[int]]:
        """The next token of each row, again and again until `length` is reached or every row has given `stop`; a row
        that has gives it on. UserError for a prompt that is empty or leaves no room."""
        for prompt in prompts:
            if not 0 < len(prompt) < self.length:
                raise UserError(f"a prompt has {len(prompt)} tokens; it needs 1 to {self.length - 1} of --length")
        generator = torch.Generator().manual_seed(sampling.seed)
        positions = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        cache, logits = self._read(prompts, positions)
        ended = [False] * len(prompts)
        while True:
            tokens = drawn(logits.cpu(), sampling, generator)
            tokens = torch.tensor([stop if e else int(t) for e, t in zip(ended, tokens, strict=True)])
            ended = [e or int(t) == stop for e, t in zip(ended, tokens, strict=True)]
            yield tokens.tolist()
            if all(ended) or int(positions.max()) >= self.length:
                return
            step = self._step(decode.decode, len(prompts), 0)
            cache, logits = step(cache, self.params, tokens.to(self.device), positions)
            positions = positions + 1

    def _read(self, prompts: Sequence[Sequence[int]], lengths: torch.Tensor) -> Any:
        """Cache and logits behind the prompts."""
        longest = min(-(-max(map(len, prompts)) // BUCKET) * BUCKET, self.length)
        padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        step = self._step(decode.prefill, len(prompts), longest)
        held = step.lowered.local_signature if step.executable.local else step.lowered.signature
        empty = decode.Cache(*(torch.zeros(x.shape, dtype=x.dtype, device=self.device) for x in held.in_infos[:2]))
        return step(empty, self.params, padded, lengths)

    def _step(self, fn: Callable[..., Any], batch: int, longest: int) -> stages.Compiled:
        """`fn` compiled for so many rows and, of prompts, columns; its cache is overwritten."""
        key = (fn, batch, longest)
        tokens = ArrayInfo((batch, longest) if longest else (batch,), torch.int64)
        infos = decode.abstract_cache(self.cfg, batch, self.length)

        def step(cache: decode.Cache, params: llama.Params, tokens: Any, positions: Any) -> Any:
            return fn(cache, params, tokens, positions, cfg=self.cfg)

        return self.compiled_once(key, step, infos, self.infos, tokens, ArrayInfo((batch,), torch.int64), donate=(0,))

    def compiled_once(
        self, key: tuple[Any, ...], fn: Callable[..., Any], *infos: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """`fn` of arguments like `infos`, compiled for this model's mesh when `key` is first asked for: a function of a
        module, and what else `fn` depends on beside the model."""
        if key not in self.compiled:
            which = " ".join(getattr(part, "__name__", str(part)) for part in key)
            self.compiled[key] = self._compiled(which, fn, infos, donate)
        return self.compiled[key]

    def _compiled(
        self, which: str, fn: Callable[..., Any], infos: Sequence[Any], donate: tuple[int, ...]
    ) -> stages.Compiled:
        rules, device, cache = decoding(self.mesh), self.options.get("device", "cpu"), self.options.get("cache")
        lowered = lambda: stages.jit(fn, donate=donate).trace(*infos).lower(self.mesh, rules)  # noqa: E731
        make = lambda: lowered().compile(self.backend, **self.options)  # noqa: E731
        if cache is None or not kept_steps.can_be_kept(self.backend, device, self.mesh):
            return make()
        shapes = [describe(info) for info in tree.leaves(tuple(infos))]
        values = {"model": asdict(self.cfg), "shapes": shapes, "mesh": str(self.mesh)}
        processes = self.options.get("processes")
        name = kept_steps.key_of(which, values, processes)
        asked = kept.Asked(name, infos, self.mesh, rules, processes, device, lowered)
        return kept_steps.taken_up(code_cache.of_inductor(cache), asked, make)


def drawn(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """A token for each row, [B]."""
    if sampling.temperature <= 0:
        return logits_BV.argmax(-1)
    sorted_BV, tokens_BV = (logits_BV / sampling.temperature).sort(descending=True, dim=-1)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = float("-inf")
    before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
    sorted_BV[before_BV >= sampling.top_p] = float("-inf")  # the first always stays
    rank_B1 = torch.multinomial(sorted_BV.softmax(-1), 1, generator=generator)
    return tokens_BV.gather(1, rank_B1)[:, 0]
