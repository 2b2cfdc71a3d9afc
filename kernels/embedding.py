"""Token embedding: rows of the table, and the scatter-add of its gradient."""

from __future__ import annotations

import torch

from kernels.registry import Factors, kernel


def embedding_reference(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """table [V, D], tokens [B, T] integer -> [B, T, D] in the table's dtype."""
    return torch.nn.functional.embedding(tokens, table)


def embedding_bwd_reference(dy: torch.Tensor, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[V, D] in dy's dtype: the rows of dy [B, T, D] summed by token, in a fixed order on CPU; of the table only the
    shape counts."""
    return torch.ops.aten.embedding_dense_backward(dy, tokens, table.shape[0], -1, False)


embedding_bwd = kernel(
    name="embedding_bwd",
    schema="(Tensor dy, Tensor tokens, Tensor table) -> Tensor",
    reference=embedding_bwd_reference,
    abstract=lambda dy, tokens, table: dy.new_empty((table.shape[0], dy.shape[-1])),
    factors=lambda *_: Factors("b t d, b t, v d -> v d", frozenset("v")),
    # Expanded, it becomes atomic adds whose order, and so the last bit of the result, changes from run to run.
    opaque=True,
)

embedding = kernel(
    name="embedding",
    schema="(Tensor table, Tensor tokens) -> Tensor",
    reference=embedding_reference,
    abstract=lambda table, tokens: table.new_empty((*tokens.shape, table.shape[1])),
    factors=lambda *_: Factors("v d, b t -> b t d", frozenset("v")),
    vjp=lambda inputs, outputs, cts: (embedding_bwd(cts[0], inputs[1], inputs[0]), None),
)
