"""A later start runs a step that was kept whole: the compiled one bit for bit, without tracing it, and never a stale
one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import llama_fn
from kernels.registry import KERNELS
from llama_fn import tree
from llama_fn.compiler import kept
from llama_fn.compiler.backends import code_cache
from llama_fn.compiler.kept import KeptLowered
from llama_fn.config_fields import flat, with_values
from llama_fn.planner import config_stages
from llama_fn.run import compiling, decoding, kept_steps
from sharding import Mesh

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("nobody_helps")


@pytest.fixture
def cpu(tiny_config, compile_cache):
    def make(dtype="fp32", **data):
        cfg = tiny_config(compute_dtype=dtype)
        run = replace(cfg.run, backend="inductor", device="cpu", compile_cache=str(compile_cache))
        return replace(cfg, run=run, data=replace(cfg.data, **data))

    return make


def steps(cfg):
    """The training and the validation step of a start."""
    train, evaluate = compiling.compile(cfg, Mesh(), None, None, with_eval=True)
    return train[cfg.data.microbatches], evaluate


def numbers(step, evaluate, cfg, fresh_state, random_inputs):
    """Every number of three iterations and of a validation."""
    state, given = fresh_state(cfg), random_inputs(cfg)
    found = []
    for _ in range(3):
        state, values = step(state, *given)
        found += [x.clone() for x in tree.leaves((state, values))]
    return [*found, evaluate(state.params, given[0])]


@pytest.fixture
def untraceable(monkeypatch):
    """Ends a start that traces."""

    def forbid():
        def trace(cfg):
            raise AssertionError("the step was traced")

        for which, (_, arguments) in compiling.STEPS.items():
            monkeypatch.setitem(compiling.STEPS, which, (trace, arguments))

    return forbid


@pytest.mark.parametrize("dtype, microbatches, segments", [("fp32", 1, True), ("fp32", 3, False), ("bf16", 3, True)])
def test_a_kept_step_is_the_compiled_one_bit_for_bit(
    cpu, dtype, microbatches, segments, fresh_state, random_inputs, untraceable
):
    cfg = cpu(dtype, microbatches=microbatches, global_batch_size=6, segments=segments)
    wanted = numbers(*steps(cfg), cfg, fresh_state, random_inputs)
    untraceable()
    step, evaluate = steps(cfg)
    assert step.from_cache and evaluate.from_cache
    found = numbers(step, evaluate, cfg, fresh_state, random_inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_a_kept_step_says_of_itself_is_what_tracing_again_says(cpu):
    cfg = cpu(microbatches=2, global_batch_size=4)
    for made, taken in zip(steps(cfg), steps(cfg), strict=True):
        a, b = made.lowered, taken.lowered
        assert isinstance(b, KeptLowered) and not isinstance(a, KeptLowered)
        assert (a.name, a.signature, a.local_signature) == (b.name, b.signature, b.local_signature)
        assert (a.inputs, a.outputs, a.layouts_of("batch")) == (b.inputs, b.outputs, b.layouts_of("batch"))
        assert a.argument_bytes == b.argument_bytes == a.memory_analysis().argument_bytes
        assert b.by_stage == (b,) and b.of_rank(0) is b
        assert "traced" not in vars(b), "so far nothing asked for a graph"
        assert (a.as_text(), a.cost_analysis(), str(made)) == (b.as_text(), b.cost_analysis(), str(taken))
        (first, *_), (second, *_) = made.executable.origins, taken.executable.origins
        assert (first.key, first.file) == (second.key, second.file) and second.file.exists()


def test_wrong_arguments_are_named_as_by_the_compiled_step(cpu, fresh_state, random_inputs):
    cfg = cpu()
    said = []
    for step, _ in (steps(cfg), steps(cfg)):
        batch, hyper = random_inputs(cfg)
        with pytest.raises(ValueError, match="made for other arguments") as error:
            step(fresh_state(cfg), replace(batch, tokens=batch.tokens[..., 1:]), hyper)
        said.append(str(error.value))
    assert said[0] == said[1] and "batch.tokens: expected" in said[0]


def test_a_start_with_kept_steps_imports_no_compiler(cpu, tmp_path):
    flags = ["--run.steps=9", "--run.eval_every=1", f"--run.compile_cache={tmp_path}", "--run.backend=inductor"]
    flags += ["--model.num_layers=2", "--model.embed_dim=32", "--model.num_heads=2", "--model.num_kv_heads=2"]
    flags += ["--model.mlp_dim=48", "--model.vocab_size=400", "--data.seq_len=16", "--data.global_batch_size=2"]
    code = """
import sys, train
from absl import flags
train.define_flags()
flags.FLAGS(["train.py", *sys.argv[1:]])
print(train.train([]), *sorted({"torch._inductor", "sympy", "jax"} & set(sys.modules)))
"""
    said = []
    for n in range(2):
        work = [f"--run.workdir={tmp_path / 'run'}", f"--run.stop_at={n + 1}", "--run.tensorboard=false"]
        command = [sys.executable, "-c", code, *flags, f"--data.path={ROOT / 'docs'}", *work]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines()[-1].split())
    assert "torch._inductor" in said[0] and said[1][1:] == [], said


def test_a_decoder_takes_up_its_steps(tiny_config, compile_cache, fresh_state, monkeypatch):
    cfg = tiny_config()
    params, said = fresh_state(cfg).params, []
    for _ in range(2):
        decoder = decoding.Decoder(cfg.model, 20, cache=compile_cache, device="cpu").load(params)
        said.append([tokens for tokens in decoder.generate([[1, 2, 3], [4, 5]], decoding.Sampling())])
        monkeypatch.setattr(decoding.stages, "jit", None)
    assert said[0] == said[1] and all(step.from_cache for step in decoder.compiled.values())
    other = decoding.Decoder(replace(cfg.model, norm_eps=0.1), 20, cache=compile_cache, device="cpu").load(params)
    with pytest.raises(TypeError, match="not callable"):  # it traces
        next(other.generate([[1, 2, 3], [4, 5]], decoding.Sampling()))


def test_what_was_said_of_a_step_is_said_again(cpu, caplog):
    texts = []
    for _ in range(2):
        with caplog.at_level("INFO", logger="llama_fn"), kept_steps.gathered() as said:
            steps(cpu(seq_len=12))  # which no other test has: said at a higher level, nothing would have been kept
        texts.append([text for _, _, text in said if text.startswith("kernels: ")])
    assert texts[0] == texts[1] and len(texts[0]) == 2


def other_value(value, kind):
    """A value of the kind that flags have."""
    if get_origin(kind) is Literal:
        return next(each for each in get_args(kind) if each != value)
    if isinstance(value, bool):
        return not value
    return f"{value}1" if isinstance(value, str) else value * 2 + 1


def test_no_flag_outside_of_the_key_changes_a_step(cpu):
    cfg = cpu()
    in_key = {name for name in flat(cfg) if name in kept_steps.FIELDS or name.split(".")[0] in kept_steps.SECTIONS}
    kinds = {part: get_type_hints(type(values)) for part, values in vars(cfg).items()}
    left = {name: (value, name.split(".")) for name, value in flat(cfg).items() if name not in in_key}
    changes = {name: other_value(value, kinds[part][field]) for name, (value, (part, field)) in left.items()}
    changes |= {"run.profile_steps": "", "data.rampup": "", "data.skip": "", "run.stop_signals": "SIGTERM"}
    assert len(changes) > 40
    other = with_values(cfg, changes)
    for trace, _ in compiling.STEPS.values():
        one, two = (config_stages.lower(trace(each), each, Mesh()) for each in (cfg, other))
        assert one.as_text() == two.as_text()
    one, two = (compiling.backend_options(each, None) for each in (cfg, other))
    assert one | {"cache": None} == two | {"cache": None}


@pytest.mark.parametrize(
    "change", [
        {"model": {"norm_eps": 1e-5}}, {"optim": {"clip": 0.0}}, {"mesh": {"remat": "full"}}, {"data": {"seq_len": 8}},
        {"run": {"norms_every": 1}}, {"run": {"attention": "reference"}},
    ],
    ids=str,
)  # fmt: skip
def test_another_flag_is_another_key(cpu, change):
    cfg = cpu()
    (section, values), *_ = change.items()
    other = replace(cfg, **{section: replace(getattr(cfg, section), **values)})
    assert kept_steps.key(cfg, "train", None) != kept_steps.key(other, "train", None)


def test_what_only_the_loop_reads_leaves_the_key(cpu):
    cfg = cpu()
    other = replace(cfg, run=replace(cfg.run, steps=7, workdir="elsewhere", seed=5, log_every=3))
    assert kept_steps.key(cfg, "train", None) == kept_steps.key(other, "train", None)
    assert kept_steps.key(cfg, "train", None) != kept_steps.key(cfg, "evaluate", None)


def test_other_sources_and_settings_of_torch_are_other_keys(cpu, monkeypatch, tmp_path):
    cfg = cpu()
    was = kept_steps.key(cfg, "train", None)
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    assert kept_steps.key(cfg, "train", None) != was
    monkeypatch.delenv("TORCHINDUCTOR_MAX_AUTOTUNE")
    assert kept_steps.key(cfg, "train", None) == was
    kept_steps._sources.cache_clear()
    (tmp_path / "added.py").write_text("x = 1\n")
    monkeypatch.setattr(llama_fn, "__path__", [str(tmp_path)])
    try:
        assert kept_steps.key(cfg, "train", None) != was
    finally:
        kept_steps._sources.cache_clear()


@pytest.mark.parametrize(
    "change", [
        {"dump_dir": "dump"}, {"profile_steps": "2:3"}, {"backend": "eager"}, {"device": "cuda"},
    ],
    ids=str,
)  # fmt: skip
def test_steps_whose_graphs_or_code_are_wanted_are_not_kept(cpu, change):
    cfg = cpu()
    assert kept_steps.are_kept(cfg, Mesh(), dumped=False)
    other = replace(cfg, run=replace(cfg.run, **change))
    assert not kept_steps.are_kept(other, Mesh(), dumped="dump_dir" in change)


def test_steps_of_a_pipeline_and_with_foreign_ops_are_not_kept(cpu, monkeypatch):
    cfg = cpu()
    assert not kept_steps.are_kept(cfg, Mesh.parse("pipe:2"), dumped=False)
    foreign = replace(KERNELS["einsum"], reference=os.path.join)
    monkeypatch.setitem(KERNELS, "foreign", foreign)
    assert not kept_steps.are_kept(cfg, Mesh(), dumped=False)


def test_a_full_disk_costs_a_word(cpu, monkeypatch):
    cfg, said = cpu(seq_len=8), []
    compiled, _ = steps(cfg)

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(kept, "atomic", full)
    monkeypatch.setattr(kept.log, "warning", lambda text, *values: said.append(text % values))
    cache = code_cache.of_inductor(Path(cfg.run.compile_cache))
    assert not kept.keep(cache, "key", compiled, [])
    assert len(said) == 1 and "step is not kept whole" in said[0] and "No space left" in said[0]
    assert not (cache / kept.FOLDER / "key.json").exists()


@pytest.mark.parametrize("harm", ["truncated", "flipped", "removed"])
def test_a_step_with_a_damaged_file_is_not_taken_up(cpu, harm, monkeypatch):
    cfg = cpu()
    steps(cfg)
    cache = code_cache.of_inductor(Path(cfg.run.compile_cache))
    asked = kept.Asked(
        kept_steps.key(cfg, "train", None), compiling.STEPS["train"][1](cfg), Mesh(), config_stages.rules(cfg, Mesh()),
        None, "cpu", lambda: None,
    )  # fmt: skip
    assert kept.load(cache, asked) is not None
    entry = json.loads((cache / kept.FOLDER / f"{asked.key}.json").read_bytes())
    needed = {f"{kept.FOLDER}/{asked.key}.json", *(file for _, file in entry["origins"])}
    needed |= {file for _, kernels in entry["codes"] for file, _ in kernels.values()}
    assert len(needed) > 2
    for name in sorted(needed):
        aside = cache.parent / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(cache, aside)
        whole = (aside / name).read_bytes()
        if harm == "removed":
            (aside / name).unlink()
        else:
            rest = b"" if harm == "truncated" else bytes([whole[-9] ^ 1]) + whole[-8:]
            (aside / name).write_bytes(whole[:-9] + rest)
        assert kept.load(aside, asked) is None, name
