"""How fast what a mesh axis joins is."""

from __future__ import annotations

from llama_fn.hardware import Hardware
from sharding import Mesh
from sharding.collectives import axes_of


def bandwidth(axes: str, mesh: Mesh, hardware: Hardware) -> float:
    """Bytes/s of the slowest link among devices that differ along `axes`, ranks filling machine after machine."""
    group = mesh.group_of(0, axes_of(axes))
    inside = max(group) - min(group) < hardware.per_machine and mesh.size > 1
    return hardware.link_bytes_per_s if inside else hardware.network_bytes_per_s
