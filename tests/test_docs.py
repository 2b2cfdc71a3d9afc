"""The snippets of README and docs/ run, top to bottom, each page in one namespace."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from kernels.registry import KERNELS
from llama_fn.checkpoint import Store
from llama_fn.compiler import passes
from llama_fn.config import Config
from llama_fn.model import train_step
from llama_fn.run import metrics

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_snippets_run(page, capsys, tmp_path, monkeypatch, tiny_config, fresh_state):
    namespace: dict = {}
    if page.name == "checkpoints.md":
        monkeypatch.chdir(tmp_path)
        saved(tiny_config(), fresh_state, tmp_path / "work/tiny_cpu/checkpoints")
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)
    if page.name == "checkpoints.md":
        assert capsys.readouterr().out == f"{tuple(fresh_state(tiny_config()).params.layers.wq.shape)}\n"
    if page.name == "README.md":
        assert snippets and callable(namespace["compiled"]) and "graph step traced" in capsys.readouterr().out
    if page.name == "adding.md":
        printed = capsys.readouterr().out
        assert "all_reduce over replica for reduce/embed" in printed and "gather over replica" not in printed
    if page.name == "sharding.md":
        printed = capsys.readouterr().out
        assert "reduce_scatter  model" in printed and "partial sum over model" in printed
    if page.name == "extending.md":
        printed = capsys.readouterr().out
        whole, halved = (int(number) for number in printed.split()[:2])
        assert whole == 2 * halved > 0
        assert "llama_fn.relu2_bwd.default" in printed and "f32[4,8,16]" in printed, "mlp is halved over model"
        check_relu2(namespace)
        for name in ("relu2", "relu2_bwd"):  # other tests go over all kernels
            del KERNELS[name]


def saved(cfg, fresh_state, folder):
    store = Store(train_step.abstract_state(cfg), folder, (1, 0))
    store.save(300, fresh_state(cfg), {})
    store.close()


def check_relu2(namespace):
    """Against the formula, in float64, and against torch's own gradient."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    y = namespace["relu2"](x)
    torch.testing.assert_close(y, x.clamp(min=0) ** 2)
    assert torch.autograd.gradcheck(namespace["relu2"], (x,), check_undefined_grad=False)


def links(page):
    return re.findall(r"\]\(([^)#]+)\)", page.read_text())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    broken = [link for link in links(page) if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_the_door_leads_to_every_page():
    assert {page.name for page in PAGES} - {"index.md"} <= set(links(ROOT / "docs" / "index.md"))


def test_the_ten_questions_have_answers_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Ten questions")[1]
    questions = re.findall(r"^\d+\. .*\?.*\]\(([^)]+)\)", text, re.M)
    assert len(questions) == 10 and all((ROOT / "docs" / link).exists() for link in questions)


def test_every_pass_is_explained_in_the_order_in_which_it_runs():
    text = (ROOT / "docs" / "passes.md").read_text()
    files = {path.stem for path in (ROOT / "llama_fn/compiler/passes").glob("*.py")} - {"__init__"}
    assert files == {Path(link).stem for link in re.findall(r"passes/(\w+\.py)\)", text)}
    rows = re.findall(r"^\| \[?(\w+)\]?", text.split("## Lowering")[1].split("## In a backend")[0], re.M)
    assert rows[1:] == ["partition", *(each.__name__ for each in passes.LOWERING)]


def test_every_word_of_the_glossary_is_used():
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    assert len(words) > 50 and len(set(words)) == len(words)
    files = (path for name in ("kernels", "sharding", "llama_fn", "tests") for path in (ROOT / name).rglob("*.py"))
    code = "\n".join(path.read_text() for path in files if path.name != Path(__file__).name)
    unused = [word for word in words if not re.search(rf"\b{re.escape(word)}", code, re.I)]
    assert not unused


def test_messages_that_troubleshooting_quotes_are_said_somewhere():
    cells = re.findall(r"^\| (`.+?`)[ |,]", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    quoted = [part for cell in cells for part in re.split(r"\.\.\.|process|\bN\b|\d|`|nan", cell) if len(part) > 12]
    sources = "\n".join(p.read_text() for n in ("sharding", "llama_fn") for p in (ROOT / n).rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", sources)  # of a message that goes over lines
    code = re.sub(r"\{[^{}]*\}", "*", code)
    unsaid = [part for part in quoted if part.strip() not in code]
    assert len(quoted) > 10 and not unsaid


def test_every_metric_is_explained():
    cfg = Config()
    values = dict.fromkeys(
        (
            "lm_loss",
            "learning_rate",
            "grad_norm",
            "loss_scale",
            "skipped_iterations",
            "nan_iterations",
            "nonfinite_params",
        ),
        1.0,
    )
    consumed = {"consumed_samples": 8, "consumed_tokens": 9, "global_batch_size": 8}
    losses = metrics.validation({"NAME": 1.0, "other": 2.0})
    row = json.loads(metrics.as_json({**metrics.record(cfg, 1, values, 1.0, 0.0, None, consumed), **losses}))
    del row["validation_loss/other"]
    explained = re.findall(r"^\| `([\w/]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    assert sorted(explained) == sorted(row)
