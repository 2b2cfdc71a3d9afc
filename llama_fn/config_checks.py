"""What a Config may be. `check` runs wherever a Config becomes a step, `resolved` where it becomes a run; both promise
that what passes has every number in its bounds, every choice among those there are, and sizes that divide one another.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator
from dataclasses import Field, fields, replace
from typing import Any

from llama_fn.config import Config, RunConfig
from llama_fn.config_fields import each_field, flat, value_of, with_values
from llama_fn.errors import UserError, nearest
from llama_fn.signals import named

_WEIGHT = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
_DEVICE = re.compile(r"(cpu|cuda|npu)(:[0-9]{1,3})?")


def check(cfg: Config) -> Config:
    """cfg, or a UserError naming the flag, what was expected and what was found."""
    kinds = {s.name: typing.get_type_hints(type(getattr(cfg, s.name))) for s in fields(cfg)}
    for name, field, value in each_field(cfg):
        _check_field(name, field, value, kinds[name.split(".")[0]][field.name])
    for whole, part, why in (
        *([] if cfg.model.head_size else [("model.embed_dim", "model.num_heads", "head_dim is their quotient")]),
        ("model.num_heads", "model.num_kv_heads", "each kv head serves the same number of query heads"),
        ("data.global_batch_size", "data.microbatches", "microbatches have equal sizes"),
    ):
        a, b = value_of(cfg, whole), value_of(cfg, part)
        if a % b:
            divisors = [n for n in range(1, min(a, 4096) + 1) if a % n == 0][:12]
            raise UserError(f"--{whole}={a} is not divisible by --{part}={b} ({why}); {part} can be {divisors}")
    if cfg.model.head_dim % 2:
        what = "--model.head_size" if cfg.model.head_size else "head_dim = model.embed_dim / model.num_heads"
        raise UserError(f"{what} = {cfg.model.head_dim} is odd; rope turns pairs")
    if cfg.model.rope_low_freq >= cfg.model.rope_high_freq:
        raise UserError(
            f"--model.rope_low_freq={cfg.model.rope_low_freq} is not below --model.rope_high_freq="
            f"{cfg.model.rope_high_freq}"
        )
    try:
        named(cfg.run.stop_signals)
    except ValueError as error:
        raise UserError(f"--run.stop_signals={cfg.run.stop_signals}: {error}") from None
    o, m = cfg.optim, cfg.mesh
    if o.decay_steps and o.warmup_steps > o.decay_steps:
        raise UserError(f"--optim.warmup_steps={o.warmup_steps} is more than optim.decay_steps={o.decay_steps}")
    if (m.remat == "budget") != (m.remat_gb > 0):
        raise UserError(
            f"--mesh.remat={m.remat} with --mesh.remat_gb={m.remat_gb}: budget needs a size above 0, "
            "and the other policies take none"
        )
    if cfg.run.check_finite and cfg.run.backend not in ("interpret", "eager"):
        raise UserError(
            f"--run.check_finite with --run.backend={cfg.run.backend}, whose code is fused and has no single ops to "
            "look at: add --run.backend=eager for one device, or interpret for a mesh; a checkpoint goes on there"
        )
    if cfg.run.sample_every and (cfg.run.backend == "npu" or "pipe" in cfg.mesh.axes):
        raise UserError(
            f"--run.sample_every={cfg.run.sample_every} goes with no pipeline and not with backend npu. Leave it out, "
            "and write texts from a checkpoint: python -m llama_fn.tools.generate"
        )
    if cfg.run.local_every and not cfg.run.local_dir:
        raise UserError(
            f"--run.local_every={cfg.run.local_every} needs --run.local_dir, a folder of each machine's own, such as "
            "/dev/shm/copies"
        )
    split_weights(cfg.data.split)
    profiled(cfg)
    dump_ranks(cfg.run)
    return cfg


def _check_field(name: str, field: Field[Any], value: Any, kind: Any) -> None:
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise UserError(f"--{name}={value} is not a choice. {nearest(str(value), typing.get_args(kind))}")
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"--{name}={value!r} is a {type(value).__name__}; expected {kind.__name__}")
    elif "bounds" in field.metadata and not field.metadata["bounds"].hold(value):
        raise UserError(f"--{name}={value} must be {field.metadata['bounds']}")


def resolved(cfg: Config) -> Config:
    """cfg checked, with its device named and the home folder put for ~ in its paths."""
    cfg = _with_device(check(cfg))
    paths = {name: _expanded(name, value) for name, f, value in each_field(cfg) if f.metadata["path"]}
    cfg = with_values(cfg, paths)
    if not cfg.run.workdir.strip():
        raise UserError("--run.workdir is empty; name a folder for checkpoints, logs and data, such as work/run")
    return cfg


def _expanded(name: str, path: str) -> str:
    if "\0" in path:
        raise UserError(f"--{name}={path!r} holds a NUL character, which no path may")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"--{name}={path}: there is no home folder to put for {expanded.split('/')[0]}; write the path")
    return expanded


def _with_device(cfg: Config) -> Config:
    r = cfg.run
    device = r.device if r.device != "auto" else "npu" if r.backend == "npu" else "cpu"
    if not _DEVICE.fullmatch(device):
        raise UserError(f"--run.device={device}: expected auto, cpu, cuda or npu")
    if (r.backend == "npu") != device.startswith("npu"):
        raise UserError(
            f"--run.device={device} does not go with --run.backend={r.backend}: an NPU runs graphs of backend npu, and "
            "nothing else does"
        )
    return replace(cfg, run=replace(r, device=device))


def whole_number(text: str) -> int | None:
    """The number that ASCII digits spell, else None: int() would take "²", "1_0" and " 7" as well."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def profiled(cfg: Config) -> range:
    """The iterations that --run.profile_steps names; empty for none. UserError for anything but FIRST:LAST."""
    text = cfg.run.profile_steps
    if not text:
        return range(0)
    first, last = (whole_number(part) for part in (text + ":").split(":")[:2])
    if text.count(":") != 1 or first is None or last is None or not 1 <= first <= last <= cfg.run.steps:
        raise UserError(f"--run.profile_steps={text} is not FIRST:LAST within 1..{cfg.run.steps}, such as 10:12")
    return range(first, last + 1)


def dump_ranks(run: RunConfig) -> list[int] | None:
    """The ranks that --run.dump_ranks names, None for all. UserError for what is neither."""
    if run.dump_ranks == "all":
        return None
    numbers = [whole_number(part.strip()) for part in run.dump_ranks.split(",")]
    ranks = [number for number in numbers if number is not None]
    if len(ranks) < len(numbers):
        raise UserError(f"--run.dump_ranks={run.dump_ranks} is neither all nor ranks such as 0,8")
    return ranks


def dumps(run: RunConfig, rank: int) -> bool:
    """Whether this rank writes to --run.dump_dir."""
    ranks = dump_ranks(run)
    return bool(run.dump_dir) and (ranks is None or rank in ranks)


def split_weights(split: str) -> list[float]:
    """Weights of train, validation and test part. UserError for other than up to three numbers, not all of them 0."""
    parts = [part.strip() for part in split.split(",")]
    if not 1 <= len(parts) <= 3 or not all(_WEIGHT.fullmatch(part) for part in parts):
        raise UserError(f"--data.split={split} is not up to three non-negative numbers such as 949,50,1")
    weights = [*map(float, parts), 0.0, 0.0][:3]
    if not 0 < sum(weights) < float("inf"):
        raise UserError(f"--data.split={split}: the weights sum to {sum(weights):g}; give at least one positive weight")
    return weights


def without_effect(cfg: Config) -> Iterator[str]:
    """What cfg asks for and will not get, one sentence each."""
    o, r, m, given = cfg.optim, cfg.run, cfg.mesh, changed(cfg)
    single = not m.axes
    for name, idle, why in (
        ("run.dump_ranks", not r.dump_dir, "nothing is dumped without --run.dump_dir"),
        ("run.attention", r.backend != "inductor", f"backend {r.backend} has one form of attention"),
        ("run.npu_form", r.backend != "npu", f"backend {r.backend} makes no GE graphs"),
        ("run.npu_streams", r.backend != "npu", f"backend {r.backend} makes no GE graphs"),
        ("run.npu_cache", r.backend != "npu", f"backend {r.backend} makes no GE graphs"),
        ("run.compile_cache", r.backend != "inductor" and not r.npu_cache,
         f"backend {r.backend} keeps no compiled code{', without --run.npu_cache' if r.backend == 'npu' else ''}"),
        ("run.keep_every", bool(r.keep_every % r.checkpoint_every),
         f"only multiples of --run.checkpoint_every={r.checkpoint_every} are saved, and few or none of these"),
        ("run.local_dir", not r.local_every, "no copies are made there without --run.local_every"),
        ("run.local_every", bool(r.local_every) and not r.local_every % r.checkpoint_every,
         f"checkpoints are made as often (--run.checkpoint_every={r.checkpoint_every})"),
        ("run.sample_prompts", not r.sample_every, "no texts are written without --run.sample_every"),
        ("run.sample_every", r.sample_every > r.steps, f"the run ends at iteration {r.steps} without a text"),
        ("run.eval_every", r.eval_every > r.steps, f"the run ends at iteration {r.steps} without a validation"),
        ("run.norms_every", r.norms_every > r.steps, f"the run ends at iteration {r.steps} without a record"),
        *((f"run.{name}", r.compile_only, "nothing is trained with --run.compile_only")
          for name in ("wandb", "mlflow", "prometheus")),
        ("mesh.remat_names", m.remat != "names", f"--mesh.remat={m.remat} takes no names"),
        ("mesh.regather", single, "one device has no sharded weights"),
        ("mesh.fuse", single, "one device has no collectives"),
        ("mesh.without", single, "one device has no collectives"),
        ("optim.initial_loss_scale", cfg.model.compute_dtype != "fp16", "only fp16 has a loss scale"),
        ("optim.loss_scale_window", cfg.model.compute_dtype != "fp16", "only fp16 has a loss scale"),
        ("optim.warmup_steps", o.warmup_steps >= r.steps, f"the run ends at iteration {r.steps}, within the warmup"),
        ("data.jsonl_key", not cfg.data.path, "Python's library is no JSON"),
    ):  # fmt: skip
        if idle and name in given:
            yield f"--{name}={given[name]} has no effect: {why}"
    if o.schedule != "constant" and o.min_lr > o.lr:
        yield f"--optim.min_lr={o.min_lr} is above --optim.lr={o.lr}: the learning rate will rise, not decay"


def changed(cfg: Config) -> dict[str, Any]:
    """Fields that are not as they are by default, by their flags' names."""
    default = flat(Config())
    return {name: value for name, value in flat(cfg).items() if value != default[name]}
