"""train.py's flags, for every program that takes them: one per field of llama_fn/config.py, and what they mean."""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from llama_fn import config, config_fields
from llama_fn.errors import UserError
from llama_fn.model import presets
from llama_fn.tools import command, help_page

FLAGS = flags.FLAGS


def define_flags() -> None:
    """One flag per config field. Model flags default to None: unset means the preset's value."""
    defaults = config.Config()
    for section in dataclasses.fields(config.Config):
        values = getattr(defaults, section.name)
        types = typing.get_type_hints(type(values))
        for field in dataclasses.fields(values):
            from_preset = section.name == "model" and field.name != "preset" and field.name != "compute_dtype"
            default = None if from_preset else getattr(values, field.name)
            bounds = field.metadata.get("bounds")
            help_text = field.metadata["help"] + (f"; {bounds}" if bounds else "")
            help_text += " (default: the preset's)" if from_preset else ""
            _define(f"{section.name}.{field.name}", types[field.name], default, help_text)


def _define(name: str, kind: Any, default: Any, help_text: str) -> None:
    if typing.get_origin(kind) is typing.Literal:
        flags.DEFINE_enum(name, default, list(typing.get_args(kind)), help_text)
    else:
        define: dict[Any, Any] = {
            bool: flags.DEFINE_bool,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            str: flags.DEFINE_string,
        }
        define[kind](name, default, help_text)


def build_config() -> config.Config:
    """The Config that the parsed flags mean."""
    cfg = config.Config(model=presets.preset(str(FLAGS["model.preset"].value)))
    given = {name: FLAGS[name].value for name in config_fields.flat(cfg) if FLAGS[name].value is not None}
    given.pop("model.preset")
    return config_fields.with_values(cfg, given)


def flags_text() -> str:
    """The resolved flags, one per line, as a flagfile; not the permissions that are given once."""
    return "".join(f"--{name}={value}\n" for name, value in config_fields.flat(build_config(), "saved").items())


def parse(argv: list[str]) -> list[str]:
    """command.parse, with flagfiles that a flagfile names looked for beside it."""
    if "--helpfull" in argv:
        return app.parse_flags_with_usage(argv)
    if {"-h", "-help", "--help"} & set(argv[1 : argv.index("--") if "--" in argv else None]):
        sys.exit(command.shown(help_page.page()))
    return command.parse(argv, with_flagfiles)


def with_flagfiles(argv: Sequence[str], folder: Path = Path(), including: tuple[Path, ...] = ()) -> list[str]:
    """argv with the lines of every --flagfile in its place. Relative names count from `folder`, for a file that a
    flagfile names from that file's own folder, so that a configuration works from everywhere.

    absl would look for all of them in the working directory. UserError for a file that cannot be read or that names
    itself.
    """
    words: list[str] = []
    given = iter(argv)
    for word in given:
        if word == "--":
            return [*words, word, *given]
        name, equals, value = word.partition("=")
        if name not in ("--flagfile", "-flagfile"):
            words.append(word)
            continue
        path = folder / os.path.expanduser(value if equals else next(given, ""))
        if path.resolve() in including:
            raise UserError(f"--flagfile={path} names itself, by way of {including[-1]}")
        words += with_flagfiles(_lines(path), path.parent, (*including, path.resolve()))
    return words


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"--flagfile={path} is not a text file") from None
    except OSError as error:
        raise UserError(f"--flagfile={path} cannot be read: {error.strerror}") from None
    return [line for line in lines if line and not line.startswith(("#", "//"))]
