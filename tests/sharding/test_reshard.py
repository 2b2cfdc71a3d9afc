"""Meshes, specs, and collectives as arithmetic: any sharding into any other gives the same global tensor."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from sharding import Mesh, P, reshard
from sharding.collectives import axes_text
from sharding.simulate import COLLECTIVES, join, part

MESH = Mesh.parse("a:2,b:3,c:2")


def test_ranks_coordinates_and_groups_agree():
    for rank in range(MESH.size):
        assert MESH.index(rank, ("a", "b", "c")) == rank
    assert MESH.groups(("c",))[0] == [0, 1] and MESH.groups(("a",))[0] == [0, 6]
    assert MESH.groups(("c", "a"))[0] == [0, 6, 1, 7], "the first axis is the outermost"


def layouts(dims):
    """Every way to lay up to three mesh axes over `dims` dimensions, in every order."""
    for count in range(4):
        for axes in itertools.permutations("abc", count):
            for where in itertools.product(range(dims), repeat=count):
                yield P.of([[a for a, w in zip(axes, where, strict=True) if w == d] for d in range(dims)])


@pytest.mark.parametrize("seed", range(120))
def test_resharding_keeps_the_global_tensor(seed):
    draw = random.Random(seed)
    every = list(layouts(2))
    source, target = draw.choice(every), draw.choice(every)
    free = sorted(set("abc") - {axis for axes in source.by_dim for axis in axes})
    pending = [axis for axis in free if draw.random() < 0.5]
    x = torch.arange(12 * 24, dtype=torch.float64).reshape(12, 24)
    values = [part(x, source, MESH, rank) for rank in range(MESH.size)]
    # A partial sum: the first device along the pending axes holds the value less the noise of the others.
    for axis in pending:
        for group in MESH.groups((axis,)):
            noise = [torch.randn(values[0].shape, dtype=torch.float64) for _ in group[1:]]
            values[group[0]] = values[group[0]] - sum(noise)
            for rank, n in zip(group[1:], noise, strict=True):
                values[rank] = n
    if len(pending) > 1:
        return  # the noise above is for one axis at a time
    source = P.of(source.by_dim, pending)
    for op, axes, args in reshard.steps(source, target, MESH):
        name = op._schema.name.split("::")[1]
        values = COLLECTIVES[name](MESH, values, axes_text(axes), MESH.extent(axes), *args)
    for rank, mine in enumerate(values):
        torch.testing.assert_close(mine, part(x, target, MESH, rank), rtol=1e-12, atol=1e-9)


def test_a_pending_sum_over_a_new_dimension_is_one_reduce_scatter():
    names = [op._schema.name for op, *_ in reshard.steps(P(None, None, unreduced=frozenset("a")), P("a", None), MESH)]
    assert names == ["llama_fn::reduce_scatter"]
    names = [op._schema.name for op, *_ in reshard.steps(P("a", None), P(None, "a"), MESH)]
    assert names == ["llama_fn::all_to_all"]


def test_padded_parts_join_to_the_tensor():
    x = torch.randn(5, 7)
    for layout in (P("b", None), P(("a", "c"), "b")):
        parts = [part(x, layout, MESH, rank) for rank in range(MESH.size)]
        assert torch.equal(join(parts, layout, MESH, x.shape), x)


def test_disagreeing_replicas_are_an_error():
    parts = [torch.zeros(2) for _ in range(MESH.size)]
    parts[3] = torch.ones(2)
    with pytest.raises(RuntimeError, match="ranks 0 and 3"):
        join(parts, P(None), MESH, (2,))


def test_an_axis_shards_one_dimension_only():
    with pytest.raises(ValueError, match="used twice"):
        P("a", "a")
