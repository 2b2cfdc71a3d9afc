"""The tasks of EleutherAI's lm-evaluation-harness, asked of one of our models (extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track

from llama_fn.errors import UserError
from llama_fn.run.decoding import Decoder, Sampling
from llama_fn.run.scoring import Row, Scorer
from llama_fn.tools.loading import Loaded

GENERATED = 256  # tokens, where a task names no limit; as lm_eval's own adapters


class Harness(TemplateLM):
    """What lm_eval asks a model for: likelihoods of continuations and of whole texts, and text up to a stop."""

    def __init__(self, model: Loaded, decoder: Decoder, batch: int, prefix: int, quiet: bool) -> None:
        super().__init__()
        if prefix < 0:
            raise UserError("--begin=none: a text with nothing before it has no first likelihood; give bos or eos")
        self.pieces, self.decoder, self.scorer = model.pieces, decoder, Scorer(decoder, batch)
        self.batch, self.prefix, self.quiet = batch, prefix, quiet

    @property
    def eot_token_id(self) -> int:
        """What a text begins with, where nothing stands before it."""
        return self.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text: behind the one that begins a document, unless told that the text continues one."""
        ids = list(self.pieces.encode(string))
        return ids if add_special_tokens is False else [self.prefix, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        bar = track(self.scorer.score(rows), "scoring", len(rows), disable=self.quiet or disable_tqdm)
        for number, total, greedy in bar:
            found[number] = (total, greedy)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of the longest length that is read."""
        rows: list[Row] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = list(self.pieces.encode(request.args[0]))
            windows = get_rolling_token_windows(ids, self.prefix, self.decoder.length, 1)
            rows += [make_disjoint_window(window) for window in windows]
            owners += [owner] * (len(rows) - len(owners))
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens([("", *row) for row in rows], disable_tqdm)  # type: ignore[misc]
        for owner, (total, _) in zip(owners, scored, strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text behind each context, up to the first of the request's stops."""
        texts = []
        for request in track(requests, "generating", disable=self.quiet or disable_tqdm):
            context, asked = request.args
            until = asked.get("until") or []
            stops = [until] if isinstance(until, str) else until
            most = min(int(asked.get("max_gen_toks", GENERATED)), self.decoder.length - 1)
            heat = float(asked.get("temperature", 0.0)) if asked.get("do_sample") else 0.0
            sampling = Sampling(heat, int(asked.get("top_k", 0)), float(asked.get("top_p", 1.0)))
            texts.append(self._text(self.tok_encode(context)[most - self.decoder.length :], sampling, most, stops))
        return texts

    def _text(self, prompt: list[int], sampling: Sampling, most: int, stops: Sequence[str]) -> str:
        said: list[int] = []
        text = ""
        for (token,) in self.decoder.generate([prompt], sampling, self.pieces.eos_id()):
            if token == self.pieces.eos_id():
                break
            said.append(token)
            text = self.pieces.decode(said)
            if len(said) == most or any(stop in text for stop in stops):
                break
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def results(
    harness: Harness, tasks: Sequence[str], folder: str | None, shots: int | None, limit: int | None
) -> dict[str, Any]:
    """lm_eval's numbers of each task. UserError for one that it does not know, or whose data is not to be had."""
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"--tasks={','.join(tasks)}: lm_eval knows no {unknown[0]}; --task_folder names your own")
    try:
        found = lm_eval.simple_evaluate(
            harness, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit, log_samples=False,
            bootstrap_iters=1000,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:  # datasets reaches for the network
        raise UserError(f"--tasks={','.join(tasks)}: its data is not to be had: {error}") from None
    return dict(found["results"])
