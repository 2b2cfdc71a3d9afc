"""Rules for meshes with axes that they do not shard over, as tests of every mesh under every preset have them."""

from __future__ import annotations

from dataclasses import replace

from llama_fn.compiler.passes.partition import rules_named
from sharding import Mesh
from sharding.rules import Rules


def copies(rules: str | Rules, mesh: Mesh) -> Rules:
    """`rules`, every axis of `mesh` allowed to hold copies."""
    return replace(rules_named(rules), replicated=tuple(name for name, _ in mesh.axes))
