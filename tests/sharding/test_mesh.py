"""A mesh by itself: which ranks belong together."""

from __future__ import annotations

from itertools import permutations

from sharding import Mesh


def test_the_group_of_a_rank_is_the_one_of_all_groups_that_has_it():
    mesh = Mesh.parse("pipe:3,data:2,model:4")
    names = [name for name, _ in mesh.axes]
    for axes in (a for n in range(4) for a in permutations(names, n)):
        groups = mesh.groups(axes)
        for rank in range(mesh.size):
            assert mesh.group_of(rank, axes) == next(group for group in groups if rank in group), (axes, rank)
