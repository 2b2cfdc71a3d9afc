"""The accuracy experiment of the 65B slice, scaled to a CPU: the GE graph in bf16 against inductor in float32.

    python tests/npu/accuracy.py WORK [--steps=200] [--out=docs/images]

The shape is LLaMA-65B's with 8 layers, every width divided by 32 (2 heads of 128), tensor and sequence parallel over 2
ranks as the original over 8. Both runs see the same tokens of the default corpus from the same initial parameters. The
step of the first is lowered by the real torchair and its GE graphs, one per rank, are executed op by op
(ge_interpreter.py). A third run, inductor in bf16, shows how far that dtype goes by itself. Resumes what WORK holds;
ends with compare_loss, whose exit status it returns. Some 10 minutes on 2 cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import standin
import torch
from absl import app, flags
from ge_interpreter import GeInterpreter

from llama_fn import config, config_fields
from llama_fn.compiler import ir
from llama_fn.compiler.backends import Executable, Program
from llama_fn.inspect.dump import rank_folder
from llama_fn.run import loop
from sharding.simulate import join, part

MESH, RULES = "model:2", "tp_sp"
VALUES = {
    "model.num_layers": 8, "model.embed_dim": 256, "model.num_heads": 2, "model.num_kv_heads": 2, "model.mlp_dim": 688,
    "model.norm_eps": 1e-5, "data.seq_len": 256, "data.global_batch_size": 8, "optim.lr": 1e-3, "optim.min_lr": 1e-4,
    "optim.warmup_steps": 20, "optim.b2": 0.999, "optim.weight_decay": 0.01, "run.eval_every": 0,
    "run.checkpoint_every": 50, "run.tensorboard": False,
}  # fmt: skip
FLAGS = flags.FLAGS


def ge_backend(folder: Path):
    """A backend that executes the graphs dumped in `folder`, a folder per rank, on global arrays."""

    def compile(program: Program) -> Executable:
        mesh = program.mesh
        ge = GeInterpreter([rank_folder(folder, r) for r in range(mesh.size)])
        written = ir.written(program.graphs[0].graph)

        def run(flat: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            held = [[part(x, p, mesh, r) for x, p in zip(flat, program.inputs, strict=True)] for r in range(mesh.size)]
            results = ge.run(held)
            for i in written:
                flat[i].copy_(join([mine[i] for mine in held], program.inputs[i], mesh, flat[i].shape))
            return results[0]  # metrics, the same on every rank

        return Executable(run, "GE graphs, interpreted")

    return compile


def lower(cfg: config.Config, folder: Path) -> None:
    """GE graphs of cfg's step, by the worker that has torch_npu."""
    values = {
        name: value
        for name, value in config_fields.flat(cfg).items()
        if name.split(".")[0] in ("model", "data", "optim")
    }
    values |= {"run.steps": cfg.run.steps}
    job = {"config": values, "mesh": MESH, "rules": RULES, "ranks": [0, 1], "out": str(folder)}
    file = folder.with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([job]))
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(file)]
    subprocess.run(command, env=standin.environment(), check=True)


def compare(run: Path, reference: Path, *args: str) -> int:
    command = [sys.executable, "-m", "llama_fn.tools.compare_loss", str(run), str(reference), "--every=20", *args]
    return subprocess.run(command).returncode


def main(argv: list[str]) -> None:
    work = Path(argv[1]).absolute()
    base = config_fields.with_values(config.Config(), {**VALUES, "run.steps": FLAGS.steps})
    narrow = replace(base, model=replace(base.model, compute_dtype="bf16"))
    ge = replace(
        narrow,
        mesh=replace(base.mesh, axes=MESH, rules=RULES),
        run=replace(base.run, backend="interpret", workdir=str(work / "ge_bf16")),
    )
    lower(ge, work / "ge_graphs")
    status = loop.run(ge, backend=ge_backend(work / "ge_graphs"))
    for name, cfg in (("inductor_fp32", base), ("inductor_bf16", narrow)):
        status = status or loop.run(replace(cfg, run=replace(cfg.run, workdir=str(work / name))))
    if status:
        sys.exit(status)
    print("how far bf16 goes from float32 by itself, both by inductor:", flush=True)
    compare(work / "inductor_bf16", work / "inductor_fp32", "--nocharts")
    print("the NPU graph in bf16 against float32:", flush=True)
    names = "--names=NPU graph in bf16 (interpreted),float32 (inductor)"
    sys.exit(compare(work / "ge_bf16", work / "inductor_fp32", f"--out={FLAGS.out}", names))


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 200, "iterations of both runs", lower_bound=1)
    flags.DEFINE_string("out", "docs/images", "folder for the charts")
    app.run(main)
