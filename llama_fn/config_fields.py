"""The fields of a Config: how one is declared, and how it is read and replaced by its dotted name.

Field metadata: `help` is the flag's help text; `numbers` marks fields that change the numbers of a run, so that a
resume with another value is refused; `saved` those that the files of a run repeat; `path` those that name a file or
folder; `bounds` is what a number may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from llama_fn.errors import UserError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")  # of dataclasses: Config
LARGEST = {int: 2**31 - 1, float: 3.4e38}  # of a number that names no bound of its own; a float must fit in float32


@dataclass(frozen=True)
class Bounds:
    """The numbers from `least` to `most`; without the ends where `open` says so."""

    least: float
    most: float
    open: bool = False

    def hold(self, value: float) -> bool:
        """False for nan, too."""
        return self.least < value < self.most if self.open else self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most in LARGEST.values():
            return f"above {self.least:g}" if self.open else f"at least {self.least:g}"
        return f"{'between' if self.open else 'from'} {self.least:g} {'and' if self.open else 'to'} {self.most:g}"


def opt(default: Any, help: str, numbers: bool = True, **more: Any) -> Any:
    """A field of any type; `more` is further metadata."""
    return field(default=default, metadata={"help": help, "numbers": numbers, "saved": True, "path": False, **more})


def number(default: float, help: str, least: float, most: float = 0, numbers: bool = True, open: bool = False) -> Any:
    """A numeric field and what it may be; `most`=0: anything that its type holds."""
    return opt(default, help, numbers, bounds=Bounds(least, most or LARGEST[type(default)], open))


def value_of(cfg: Any, dotted: str) -> Any:
    """The value of "model.num_layers"; AttributeError for an unknown name."""
    section, name = dotted.split(".")
    return getattr(getattr(cfg, section), name)


def each_field(cfg: Any) -> Iterator[tuple[str, Field[Any], Any]]:
    """("model.num_layers", its field, its value) for every field."""
    for section in fields(cfg):
        values = getattr(cfg, section.name)
        for f in fields(values):
            yield f"{section.name}.{f.name}", f, getattr(values, f.name)


def flat(cfg: Any, marked: str = "") -> dict[str, Any]:
    """{"model.num_layers": 6, ...}; only the fields whose metadata has `marked`, "numbers" or "saved", where given."""
    return {name: value for name, f, value in each_field(cfg) if not marked or f.metadata[marked]}


def with_values(cfg: C, values: Mapping[str, Any]) -> C:
    """cfg with dotted names replaced; an unknown name is a UserError with the nearest one."""
    known = flat(cfg)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{name} is not a setting. {nearest(name, known)}")
        section, leaf = name.split(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{leaf: value})})
    return cfg
