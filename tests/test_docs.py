"""The snippets of docs/ run, top to bottom, each page in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kernels.registry import KERNELS

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
    if page.name == "extending.md":
        printed = capsys.readouterr().out
        whole, halved = (int(number) for number in printed.split()[:2])
        assert whole == 2 * halved > 0
        assert "llama_fn.relu2_bwd.default" in printed and "f32[4,8,16]" in printed, "mlp is halved over model"
        check_relu2(namespace)
        for name in ("relu2", "relu2_bwd"):  # other tests go over all kernels
            del KERNELS[name]


def check_relu2(namespace):
    """Against the formula, in float64, and against torch's own gradient."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = namespace["relu2"](x)
    torch.testing.assert_close(y, x.clamp(min=0) ** 2)
    assert torch.autograd.gradcheck(namespace["relu2"], (x,), check_undefined_grad=False)
