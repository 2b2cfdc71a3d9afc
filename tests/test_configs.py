"""Every recipe under configs/ is a valid configuration; the slice logs what AscendSpeed's LLaMA-65B recipe logged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fn import config, config_fields
from llama_fn.data import mixture
from llama_fn.hardware import named
from llama_fn.model import hyper, optim
from llama_fn.planner import plan
from llama_fn.run import metrics
from sharding import Mesh
from sharding.rules import PRESETS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(p.name for p in (ROOT / "configs").glob("*.flags"))
PAPER = {
    "llama_7b_8npu.flags": ["--flagfile=configs/hyper/paper_7b.flags"],
    "llama_65b_8layers_8npu.flags": ["--flagfile=configs/hyper/paper_65b.flags"],
    "llama_65b_32npu.flags": ["--flagfile=configs/hyper/paper_65b.flags", "--data.microbatches=512"],
    "llama_65b_32npu_zero3.flags": ["--flagfile=configs/hyper/paper_65b.flags", "--data.microbatches=128"],
    "llama_65b_96npu.flags": [
        "--flagfile=configs/hyper/paper_65b.flags", "--data.global_batch_size=2112", "--data.microbatches=352"
    ],
    "llama_65b_96npu_zero3.flags": [
        "--flagfile=configs/hyper/paper_65b.flags", "--data.global_batch_size=2112", "--data.microbatches=44"
    ],
}  # fmt: skip


def load(*args: str) -> config.Config:
    script = (
        "import json, sys\nfrom llama_fn import config_checks, config_fields\nfrom llama_fn.tools import config_flags\n"
        "config_flags.define_flags()\nconfig_flags.parse(sys.argv)\n"
        "print(json.dumps(config_fields.flat(config_checks.resolved(config_flags.build_config()))))"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import json

    return config_fields.with_values(config.Config(), json.loads(done.stdout))


def check(cfg: config.Config) -> None:
    mesh, d, m = Mesh.parse(cfg.mesh.axes), cfg.data, cfg.model
    data, model = (dict(mesh.axes).get(axis, 1) for axis in ("data", "model"))
    assert cfg.mesh.rules in PRESETS
    assert d.global_batch_size // d.microbatches % data == 0
    assert d.microbatches >= dict(mesh.axes).get("pipe", 1), "stages would be idle"
    assert all(size % model == 0 for size in (m.num_heads, m.num_kv_heads, m.mlp_dim, m.vocab_size, d.seq_len))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_divide(name):
    cfg = load(f"--flagfile=configs/{name}")
    check(cfg)
    devices = re.search(r"(\d+)npu", name)
    assert Mesh.parse(cfg.mesh.axes).size == (int(devices[1]) if devices else 1)
    assert (cfg.run.backend == "npu") == ("npu" in name)
    if name in PAPER:
        paper = load(f"--flagfile=configs/{name}", *PAPER[name])
        check(paper)
        assert (paper.optim.b2, paper.optim.weight_decay, paper.optim.warmup_steps) == (0.95, 0.1, 2000)
        assert 4e6 < paper.data.global_batch_size * paper.data.seq_len < 4.4e6, "4M tokens a batch"
        assert (cfg.optim.b2, cfg.optim.weight_decay, cfg.optim.warmup_steps) == (0.999, 0.01, 3200)


SAID = {name: re.search(r"[Pp]redicted peak (\d+) GB", (ROOT / "configs" / name).read_text()) for name in RECIPES}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if SAID[name]])
def test_peaks_that_comments_predict_are_those_of_a_plan(name):
    cfg = load(f"--flagfile=configs/{name}")
    made = plan.make(cfg, Mesh.parse(cfg.mesh.axes), named("ascend_910b1", cfg.model.compute_dtype))
    assert round(made.peak_bytes / 1e9) == int(SAID[name][1]), made.peak_bytes
    assert made.fits


@pytest.mark.parametrize(("hyper", "b2"), [("ascendspeed_7b", 0.999), ("paper_7b", 0.95)])
def test_one_npu_takes_either_set_of_hyper_parameters(hyper, b2):
    extra = [f"--flagfile=configs/hyper/{hyper}.flags", "--data.global_batch_size=32"]
    cfg = load("--flagfile=configs/single_npu.flags", *extra)
    check(cfg)
    assert cfg.optim.b2 == b2 and cfg.data.global_batch_size == 32


def test_the_slice_logs_the_numbers_of_ascendspeeds_recipe():
    cfg = load("--flagfile=configs/llama_65b_8layers_8npu.flags")
    rate = optim.warmup_decay("cosine")(torch.tensor(3.0), hyper.hyperparameters(cfg)).item()
    values = {
        "lm_loss": 12.0, "learning_rate": rate, "grad_norm": 1.0, "loss_scale": 1.0, "skipped_iterations": 0,
        "nan_iterations": 0, "nonfinite_params": 0,
    }  # fmt: skip
    consumed = {"consumed_samples": 3 * 256, "consumed_tokens": 3 * 256 * 2048, "global_batch_size": 256}
    line = metrics.line(cfg, metrics.record(cfg, 3, values, 33.818, 0.0, None, consumed))
    for part in (
        "iteration        3/   50000", "consumed samples:          768", "consumed tokens:      1572864",
        "elapsed time per iteration (ms): 33818.0", "learning rate: 1.406E-07", "global batch size:   256",
        "samples per second: 7.570", "TFLOPs: 107.09",
    ):  # fmt: skip
        assert part in line, (part, line)


@pytest.mark.parametrize("script", ["torchrun_one_node.sh", "torchrun_nodes.sh"])
def test_run_scripts_parse_and_say_how_they_are_used(script):
    path = ROOT / "configs" / script
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert done.returncode == 2 and f"bash configs/{script}" in done.stderr


def test_the_stand_ins_of_llamas_mixture_are_made_and_named_in_its_file(tmp_path):
    """Seven sources of real text without a network, whose names and weights are those of the paper."""
    command = [sys.executable, "-m", "llama_fn.tools.corpus", f"--out={tmp_path}", "--mb=0.05"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = mixture.sources(str(ROOT / "configs" / "mixture_llama.yaml"))
    assert {f"{source.name}.jsonl" for source in listed} == {path.name for path in tmp_path.iterdir()}
    assert [source.weight for source in listed] == [67, 15, 4.5, 4.5, 4.5, 2.5, 2]
    for source in listed:
        assert Path(source.path) == Path("work/corpus") / f"{source.name}.jsonl"
        texts = [json.loads(line)["text"] for line in (tmp_path / f"{source.name}.jsonl").read_text().splitlines()]
        assert 10_000 < sum(map(len, texts)) <= 50_000
