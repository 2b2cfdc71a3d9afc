"""train.py's flags, for every program that takes them: one per field of llama_fn/config.py, and what they mean."""

from __future__ import annotations

import dataclasses
import sys
import typing
from typing import Any

from absl import app, flags

from llama_fn import config
from llama_fn.errors import nearest

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
            help_text = field.metadata["help"] + (" (default: the preset's)" if from_preset else "")
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
    cfg = config.Config(model=config.preset(str(FLAGS["model.preset"].value)))
    given = {name: FLAGS[name].value for name in config.flat(cfg) if FLAGS[name].value is not None}
    given.pop("model.preset")
    return config.with_values(cfg, given)


def flags_text() -> str:
    """The resolved flags, one per line, as a flagfile."""
    return "".join(f"--{name}={value}\n" for name, value in config.flat(build_config()).items())


def parse(argv: list[str]) -> list[str]:
    """absl's parser, with the nearest of our flags for a name that does not exist."""
    try:
        return app.parse_flags_with_usage(argv) if "--helpfull" in argv else FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        print(
            f"error: --{error.flagname} is not a flag. {nearest(error.flagname, config.flat(config.Config()))}",
            file=sys.stderr,
        )
    except (flags.Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
