"""--help of the programs that take a run's flags: by section, with what the names of choices may be."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from absl import flags

from llama_fn import config, config_fields
from llama_fn.model.presets import PRESETS, preset

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
INDENT = 30


def page() -> str:
    """The page of the program that runs."""
    main = sys.modules["__main__"]
    return "\n".join([(main.__doc__ or "").strip(), "", *_own(), *_sections(), *_presets(), *_flagfiles()])


def _own() -> Iterator[str]:
    """Flags of the program itself, which are no field of a section."""
    fields = {name for name, _, _ in config_fields.each_field(config.Config())}
    own = [flag for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]) if flag.name not in fields]
    if own:
        yield "This program"
        for flag in own:
            given = "" if flag.default is None else flag.default
            yield from _entry(f"  --{flag.name}={given}", flag.help or "")
        yield ""


def _sections() -> Iterator[str]:
    cfg = config.Config()
    for section in dataclasses.fields(cfg):
        values = getattr(cfg, section.name)
        yield f"--{section.name}.*  {(type(values).__doc__ or '').splitlines()[0]}"
        for field in dataclasses.fields(values):
            flag = flags.FLAGS[f"{section.name}.{field.name}"]
            given = "" if flag.default is None else flag.default
            yield from _entry(f"  --{flag.name}={given}", str(flag.help))
        yield ""


def _presets() -> Iterator[str]:
    yield "--model.preset is one of"
    for name in PRESETS:
        cfg = preset(name)
        shape = f"{cfg.num_layers} layers, {cfg.embed_dim} wide, {cfg.num_heads} heads"
        kv = f" ({cfg.num_kv_heads} of keys and values)" if cfg.num_kv_heads != cfg.num_heads else ""
        yield f"  {name:<20}{shape}{kv}, mlp {cfg.mlp_dim}, vocabulary {cfg.vocab_size}"
    yield ""


def _flagfiles() -> Iterator[str]:
    """What configs/ has, each with the first sentence of its comment."""
    files = sorted(CONFIGS.rglob("*.flags"))
    if files:
        yield "--flagfile may be one of"
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
        first = re.split(r"\. (?=[A-Z])|; ", comment)[0]
        yield from _entry(f"  configs/{path.relative_to(CONFIGS)}", textwrap.shorten(first, 140, placeholder=" ..."))


def _entry(name: str, about: str) -> Iterator[str]:
    """A name, and beside or below it what it is about."""
    width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 120))
    lines = textwrap.wrap(about, width - INDENT) or [""]
    if len(name) < INDENT - 1:
        yield f"{name:<{INDENT}}{lines[0]}"
        lines = lines[1:]
    else:
        yield name
    for line in lines:
        yield " " * INDENT + line
