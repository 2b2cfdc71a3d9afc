"""Sharding as values: meshes, partition specs and the one annotation that models call."""

from sharding.constraint import constrain, reshard_as
from sharding.mesh import Mesh
from sharding.spec import P

__all__ = ["Mesh", "P", "constrain", "reshard_as"]
