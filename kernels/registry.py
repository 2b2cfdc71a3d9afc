"""The kernel record: one op of the step, with everything that every later stage asks about it.

An op is defined once with :func:`kernel` and becomes `torch.ops.llama_fn.<name>`. Its `reference` is the
definition, run by the eager path and expanded by compilers; `vjp` is the backward, itself written with kernels.
`torch.library.custom_op` is not used because its autograd wrapper has no `setup_context`, which `torch.func`
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from kernels import scope

Argument = Any  # of an op: a tensor, None, a number, a string, or a list of them
Results = Any  # of an op: a tensor or a tuple of them
Vjp = Callable[[Sequence[Argument], Sequence[torch.Tensor], Sequence[Any]], Sequence[Any]]

NAMESPACE = "llama_fn"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
KERNELS: dict[str, Kernel] = {}


@dataclass(frozen=True)
class Factors:
    """A sharding rule over factors, as in OpenXLA's Shardy.

    `rule` is "operands -> results" with one letter per dimension, operands separated by commas, e.g.
    "b t n h, b s n h, b s n h -> b t n h". A factor absent from every result is contracted: sharding it leaves the
    results unreduced. An operand "_" counts for nothing but its device. `replicated` lists the factors that may not be
    sharded at all.
    """

    rule: str
    replicated: frozenset[str] = frozenset()

    @property
    def operands(self) -> tuple[tuple[str, ...], ...]:
        """The factors of each operand, one per dimension: (("b", "t"), ...)."""
        return _terms(self.rule.split("->")[0])

    @property
    def results(self) -> tuple[tuple[str, ...], ...]:
        """The factors of each result, one per dimension."""
        return _terms(self.rule.split("->")[1])


def same_dims(x: torch.Tensor) -> Factors:
    """The rule of an op whose result has the dimensions of its operand, any of them sharded."""
    letters = " ".join("abcdefgh"[: x.dim()])
    return Factors(f"{letters} -> {letters}")


def _terms(side: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(term.split()) for term in side.split(","))


def tensor_bytes(values: Results) -> int:
    """Bytes of every tensor in an op's (flat) arguments or results."""
    values = values if isinstance(values, (tuple, list)) else (values,)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


@dataclass(frozen=True)
class Kernel:
    """One op.

    `schema` is the torch schema without the name. `reference(*args)` computes in plain torch; `abstract(*args)`
    gives results of the right shape and dtype from fake tensors; `vjp(inputs, outputs, cotangents)` gives one
    cotangent or None per input; `factors(*args)` the sharding rule; `flops(*args)` the floating-point operations
    of the matrix products (pointwise work is counted as bytes); `scratch(*args)` the bytes that live while the op runs
    and are none of its results, where they are many. `impls` are faster forms with the same signature,
    used only where a backend is asked for one by name. `npu(*args)` writes the op in torch's and torch_npu's operators,
    for which torchair has Ascend ops; None where `reference` has nothing but such operators. `opaque` names keep the op
    whole in compiled code.
    """

    name: str
    schema: str
    reference: Callable[..., Results]
    abstract: Callable[..., Results]
    factors: Callable[..., Factors]
    flops: Callable[..., int] = lambda *args: 0
    scratch: Callable[..., int] = lambda *args: 0
    vjp: Vjp | None = None
    impls: Mapping[str, Callable[..., Results]] = field(default_factory=dict)
    npu: Callable[..., Results] | None = None
    opaque: bool = False

    @property
    def op(self) -> Any:
        """The torch operator, as nodes of a graph name it."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def bytes(self, args: Sequence[Argument], results: Results) -> int:
        """Bytes moved when every operand is read once and every result written once."""
        return tensor_bytes(args) + tensor_bytes(results)

    def __call__(self, *args: Argument) -> Results:
        """Results of the op, differentiable where it has a vjp; in a trace its node carries the caller's line."""
        with scope.source_line():
            if self.vjp is None:
                return self.op(*args)
            return _FUNCTIONS[self.name].apply(*args)


_FUNCTIONS: dict[str, Any] = {}


def kernel(**fields: Any) -> Kernel:
    """Define a kernel, register its torch op, and return it, callable."""
    new = Kernel(**fields)
    assert new.name not in KERNELS, f"kernel {new.name} is defined twice"
    _LIBRARY.define(new.name + new.schema)
    _LIBRARY.impl(new.name, new.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{new.name}", new.abstract, lib=_LIBRARY)
    KERNELS[new.name] = new
    if new.vjp is not None:
        _FUNCTIONS[new.name] = differentiable(new.name, new.op, new.vjp)
    return new


def differentiable(name: str, op: Callable[..., Results], vjp: Vjp) -> Any:
    """An autograd.Function around `op` that `torch.func` transforms accept; its backward runs in the op's scope."""

    def forward(*args: Argument) -> Results:
        return op(*args)

    def setup_context(ctx: Any, inputs: tuple[Argument, ...], output: Results) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [x for x in (*inputs, *outputs) if isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.inputs = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.location = scope.current()
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if is_t else x for is_t, x in zip(ctx.is_tensor, ctx.inputs, strict=True)]
        with scope.backward_of(ctx.location):
            return tuple(vjp(inputs, list(saved), cotangents))

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    return type(f"{name}_function", (torch.autograd.Function,), members)


@lru_cache(maxsize=1024)
def of_node(target: object) -> Kernel | None:
    """The kernel that an FX node's target calls, or None for an op that is not ours."""
    name = getattr(target, "__module__", "") if isinstance(target, str) else str(target)
    if not name.startswith(NAMESPACE + "."):
        return None
    return KERNELS[name.split(".")[1]]
