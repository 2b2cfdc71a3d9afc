"""Tasks of lm_eval: our numbers are those of its own adapter over transformers, of the same weights. (Extra `eval`.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_fn.data import tokenizer
from llama_fn.tools import convert_in, convert_out

pytest.importorskip("lm_eval", reason="the extra eval is missing; runs in make nightly")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
THEIRS = """
import json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
found = {}
# With add_bos_token it would put two such tokens before a whole text.
for tasks, bos in ((["choices", "answers"], True), (["texts"], False)):
    model = HFLM(pretrained=sys.argv[1], dtype="float32", device="cpu", max_length=64, batch_size=1, add_bos_token=bos,
                 prefix_token_id=int(sys.argv[4]))
    asked = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=TaskManager(include_path=sys.argv[2]),
                                    bootstrap_iters=0, log_samples=True)
    found |= asked["results"]
    if bos:
        found["said"] = [s["resps"][0][0] for s in asked["samples"]["answers"]]
json.dump(found, open(sys.argv[3], "w"))
"""


def asked(folder, said):
    """The data of the tasks, and their files. `said`: the right answers."""
    texts = [p.read_text() for p in sorted(Path(subprocess.__file__).parent.glob("*.py"))[20:44]]
    rows = []
    for i, text in enumerate(texts):
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 20]
        choices = [" " + line[:40] for line in lines[1:5]]
        rows.append({"question": lines[0][:60], "choices": choices, "answer": i % 4, "text": text[: 40 + 60 * i]})
        rows[-1]["said"] = said[i] if said else "?"
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{HEAD.replace('DATA', str(data))}{text}")


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


def test_scores_are_those_of_lm_evals_own_adapter(models, tmp_path):
    ours, theirs, tasks = tmp_path / "ours", tmp_path / "theirs", tmp_path / "tasks"
    convert_in.convert(models / "llama", ours, None)
    texts = [p.read_text() for p in sorted(Path(subprocess.__file__).parent.glob("*.py"))[:20]]
    tokenizer.train(texts, 400, ours / "tokenizer.model")
    pieces = tokenizer.load(ours / "tokenizer.model")
    convert_out.convert(ours, theirs, "float32")
    tasks.mkdir()
    asked(tasks, None)
    (tmp_path / "theirs.py").write_text(THEIRS)
    run(tmp_path / "theirs.py", theirs, tasks, tmp_path / "theirs.json", pieces.bos_id())
    want = json.loads((tmp_path / "theirs.json").read_text())
    # Bytes that are no UTF-8 the two tokenizers write in two ways.
    whole = [text for text in want["said"] if "\ufffd" not in text]
    asked(tasks, [text.strip() if text in whole else "not asked" for text in want["said"]])

    flags = [f"--source={ours}", f"--task_folder={tasks}", "--seq_len=64", "--batch=5", "--backend=eager"]
    names = f"--tasks={','.join(TASKS)}"
    print(run("-m", "llama_fn.tools.evaluate", *flags, names, f"--json={tmp_path / 'ours.json'}"))
    found = json.loads((tmp_path / "ours.json").read_text())["tasks"]
    assert 0 < found["choices"]["acc,none"] < 1
    for task in ("choices", "texts"):
        for metric, value in want[task].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert found[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    assert len(whole) > 2 and found["answers"]["exact_match,none"] == len(whole) / len(want["said"])
