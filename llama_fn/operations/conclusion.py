"""What a run leaves for a person when it ends, however it ends: summary.md, report.html, and a few lines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_fn.operations import report, summary
from llama_fn.operations.attempts import read
from llama_fn.operations.facts import gather

log = logging.getLogger("llama_fn.conclusion")


@contextmanager
def concluded(workdir: Path) -> Iterator[None]:
    """Behind the block, if this process trained in `workdir`, or tried to: another one's folder is left alone."""
    try:
        yield
    finally:
        _conclude(workdir)


def _conclude(workdir: Path) -> None:
    attempts = read(workdir)
    if not attempts or attempts[-1].start["pid"] != os.getpid() or attempts[-1].first is None:
        return
    try:
        facts = gather(workdir)
        log.info("%s", summary.write(facts).rstrip())
        report.write([facts], workdir / report.FILE)
        log.info("more: %s", workdir / report.FILE)
    except OSError as error:  # a full disk must not hide how the run itself ended
        log.warning("no summary and no report: %s", error)
