"""constrain: the sharding annotation, and its transpose.

Forward: the value takes the named sharding. Backward: the cotangent goes into the sharding that the primal *input*
had, so an all-gather in the forward is a reduce-scatter in the backward, exactly. Which sharding the input had is
known only when the graph is partitioned; the transpose therefore names the input itself (`reshard_as`). On one
device both are the identity.
"""

from __future__ import annotations

import torch

from kernels.registry import kernel, same_dims
from sharding.spec import P

reshard_as_op = kernel(
    name="reshard_as",
    schema="(Tensor x, Tensor like) -> Tensor",
    reference=lambda x, like: x.clone(),
    abstract=lambda x, like: torch.empty_like(x),
    factors=lambda x, like: same_dims(x),
)

constrain_op = kernel(
    name="constrain",
    schema="(Tensor x, str spec, str table) -> Tensor",
    reference=lambda x, spec, table: x.clone(),
    abstract=lambda x, spec, table: torch.empty_like(x),
    factors=lambda x, spec, table: same_dims(x),
    vjp=lambda inputs, outputs, cts: (reshard_as_op(cts[0], inputs[0]), None, None),
)


def constrain(x: torch.Tensor, spec: P, table: str = "compute") -> torch.Tensor:
    """x with the sharding that a table of the rules (sharding/rules.py) gives to the LOGICAL axes of `spec`, one per
    dimension. P() for a scalar: a partial sum is summed up."""
    if len(spec) != x.dim():
        raise ValueError(f"constrain: {spec} has {len(spec)} dimensions, the tensor {tuple(x.shape)} has {x.dim()}")
    return constrain_op(x, spec.encode(), table)


def reshard_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x with the sharding of `like`, which has the same dimensions."""
    return reshard_as_op(x, like)
