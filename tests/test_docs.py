"""The snippets of docs/ run, top to bottom, each page in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_run(page, capsys):
    namespace: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)
    if page.name == "sharding.md":
        printed = capsys.readouterr().out
        assert "reduce_scatter  model" in printed and "pending sum over model" in printed
