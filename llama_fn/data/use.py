"""How often a run reads each source: a table before it starts, a warning, and an error beyond a source's cap."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from llama_fn.data.blend import normalized
from llama_fn.data.mixture import Source
from llama_fn.data.samples import Samples
from llama_fn.errors import UserError

log = logging.getLogger("llama_fn.data")
OFTEN = 4.0  # from which on repeated text teaches little (Muennighoff et al. 2023)


def table(sources: Sequence[Source], parts: Sequence[Samples], count: int) -> str:
    """Tokens, share and epochs of each source in a run of `count` samples. UserError where one would be read more often
    than its `epochs` allow; a warning for much repetition."""
    shares = normalized([source.weight for source in sources])
    lines = [f"mixture of {len(sources)} sources, {count} samples:",
             f"  {'source':16}{'documents':>12}{'tokens':>16}{'share':>9}{'samples':>12}{'epochs':>9}"]  # fmt: skip
    for source, part, share in zip(sources, parts, shares, strict=True):
        samples, epochs = round(count * share), count * share / part.per_epoch
        lines.append(
            f"  {source.name:16}{len(part.data):12d}{len(part.data.tokens):16d}{share:9.2%}{samples:12d}{epochs:9.2f}"
        )
        refuse_too_often(source, epochs)
        if epochs > OFTEN and not source.epochs:
            log.warning(
                "source %s will be read %.1f times; beyond %g, text that is repeated teaches little", source.name,
                epochs, OFTEN,
            )  # fmt: skip
    return "\n".join(lines)


def refuse_too_often(source: Source, epochs: float) -> None:
    """UserError where a run reads a source more often than is allowed."""
    if source.epochs and epochs > source.epochs:
        raise UserError(
            f"source {source.name} would be read {epochs:.2f} times, and its epochs are {source.epochs:g}: lower its "
            "weight or --run.steps, give more of it, or raise its epochs"
        )
