"""The scopes that passes look for, by name: made here and taken apart here, and nowhere else.

    microbatch/1/layers/3/mlp            layer 3 in microbatch 1
    gather/layers/3/wq                   a weight of layer 3, gathered once for all microbatches
    microbatch/1/gather/layers/3/wq      the same, gathered for one microbatch
    reduce/layers/3/wq                   its gradient, summed over devices
    microbatch/1/accumulate/layers/3/wq  and added to those of earlier microbatches

What repeats is a name and a number: "layers/3", or "blocks/3" for a model that calls its layers so. Passes overlap,
share code and extrapolate by these numbers, and a layer without one costs overlap and compile time. So name layers with
:func:`layer`, and what a model gathers and reduces with GATHER and REDUCE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

MICROBATCH, GATHER, REDUCE, ACCUMULATE, LAYERS = "microbatch", "gather", "reduce", "accumulate", "layers"
_ROLES = (GATHER, REDUCE, ACCUMULATE)
_PART = re.compile(r"[^/]+(?:/(?:\d+|\*)(?=/|$))?")  # "layers/3" is one
_INSIDE = " < "
_SCOPE = re.compile(
    rf"(?:{MICROBATCH}/(?P<microbatch>\d+)(?:/|$))?(?:(?P<role>{'|'.join(_ROLES)})(?:/|$))?"
    r"(?:(?P<group>[A-Za-z_]\w*)/(?P<layer>-?\d+)(?:/|$))?(?P<rest>.*)"
)


def microbatch(i: int, then: str = "") -> str:
    """The scope of a microbatch, or of a role in it."""
    return "/".join(filter(None, (MICROBATCH, str(i), then)))


def layer(i: int, group: str = LAYERS) -> str:
    """The scope of the i-th of a group of layers that are alike."""
    return f"{group}/{i}"


def of_path(path: str) -> str:
    """The scope of a leaf: layers/3/wq of layers[3].wq."""
    return re.sub(r"\W+", "/", path).strip("/") or "value"


def without_numbers(scope: str) -> str:
    """layers/*/mlp of layers/3/mlp: layers, and microbatches, taken together."""
    return re.sub(r"\b\d+\b", "*", scope)


def inside_out(scope: str) -> str:
    """ "mlp < layers/3 < microbatch/0" of microbatch/0/layers/3/mlp, for readers who see the beginning."""
    return _INSIDE.join(reversed(_PART.findall(scope)))


def outside_in(text: str) -> str:
    """The scope that `inside_out` made this of."""
    return "/".join(reversed(text.split(_INSIDE)))


@dataclass(frozen=True)
class Scope:
    """A scope taken apart. `role`: what is done with weights or gradients there, "" for computing; `group` and `layer`:
    which of which layers, "" and None outside of them; `rest` is what follows."""

    microbatch: int | None
    role: str
    group: str
    layer: int | None
    rest: str

    @property
    def is_layer(self) -> bool:
        """In the computation of a numbered layer."""
        return not self.role and self.layer is not None

    @property
    def place(self) -> str:
        """The scope up to its layer, or role, or microbatch: "microbatch/1/layers/3"."""
        return self._text(self.layer, "")

    def with_layer(self, number: int | None) -> str:
        """The same scope of another layer; None: of any, written as a star."""
        return self._text("*" if number is None else number, self.rest)

    def in_microbatch(self, number: int | None) -> str:
        """The same scope in another microbatch, or outside of any."""
        return replace(self, microbatch=number)._text(self.layer, self.rest)

    def _text(self, layer: object, rest: str) -> str:
        parts = [MICROBATCH, str(self.microbatch)] if self.microbatch is not None else []
        parts += [self.role] if self.role else []
        parts += [self.group, str(layer)] if self.group else []
        return "/".join([*parts, *([rest] if rest else [])])


@lru_cache(maxsize=1 << 16)
def parse(scope: str) -> Scope:
    """A scope taken apart; numbers of layers may be negative, where something counts them from the end."""
    match = _SCOPE.fullmatch(scope)
    assert match is not None, scope
    number, layer = match["microbatch"], match["layer"]
    return Scope(
        None if number is None else int(number), match["role"] or "", match["group"] or "",
        None if layer is None else int(layer), match["rest"],
    )  # fmt: skip
