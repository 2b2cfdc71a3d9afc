"""From a Config to the stages of its step: mesh, traced, lowered."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from llama_fn import tree
from llama_fn.compiler import passes, stages
from llama_fn.compiler.passes.partition import rules_named
from llama_fn.compiler.passes.remat_regions import Remat
from llama_fn.config import Config
from llama_fn.config_checks import whole_number
from llama_fn.errors import UserError
from llama_fn.model import train_step
from llama_fn.tree import Tree
from sharding import Mesh
from sharding.errors import local_shape
from sharding.rules import Rules
from sharding.stages import Pipeline, stage_count


def mesh(cfg: Config) -> Mesh:
    """The mesh of --mesh.axes; UserError for what is none."""
    try:
        return Mesh.parse(cfg.mesh.axes)
    except ValueError as error:
        raise UserError(f"--mesh.axes={cfg.mesh.axes}: {error}") from None


def rules(cfg: Config, mesh: Mesh) -> Rules:
    """The rules of cfg's mesh section; UserError for an unknown preset, or for copies along no axis of the mesh."""
    copies = tuple(_listed(cfg.mesh.replicated))
    for name in copies:
        if name not in dict(mesh.axes):
            raise UserError(f"--mesh.replicated={cfg.mesh.replicated}: {mesh} has no axis {name}")
    return replace(rules_named(cfg.mesh.rules), replicated=copies)


def pipeline(cfg: Config) -> Pipeline:
    """How the stages of cfg's mesh hold the model and work; UserError for layers that are no numbers, and for what asks
    for stages of a mesh that has none."""
    asked = [f"--mesh.chunks={cfg.mesh.chunks}"] if cfg.mesh.chunks > 1 else []
    asked += [f"--mesh.stage_layers={cfg.mesh.stage_layers}"] if cfg.mesh.stage_layers else []
    if asked and stage_count(mesh(cfg)) == 1:
        raise UserError(
            f"{' '.join(asked)} deals layers out to the stages of a pipeline, and --mesh.axes={cfg.mesh.axes} has "
            "none: add pipe:N to the mesh, or leave this out"
        )
    held = [whole_number(text) for text in _listed(cfg.mesh.stage_layers)]
    if None in held:
        raise UserError(
            f"--mesh.stage_layers={cfg.mesh.stage_layers}: expected the number of layers of each stage, such as 20,20"
        )
    return Pipeline(cfg.mesh.schedule, cfg.mesh.chunks, tuple(n for n in held if n is not None))


def local_bytes(infos: Tree, name: str, mesh: Mesh, rules: Rules) -> dict[str, int]:
    """Bytes of one device's part of every leaf of a tree, by its path below `name`."""
    sizes = {}
    for path, info in zip(tree.paths(infos, name), tree.leaves(infos), strict=True):
        layout = rules.layout(info.axes or (None,) * len(info.shape), info.table, mesh)
        sizes[path] = prod(local_shape(info.shape, layout, mesh, path, True)) * info.dtype.itemsize
    return sizes


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def small(cfg: Config, layers: int, microbatches: int) -> Config:
    """cfg with fewer layers and microbatches, of the same size."""
    size = cfg.data.global_batch_size // cfg.data.microbatches
    data = replace(cfg.data, microbatches=microbatches, global_batch_size=microbatches * size)
    return replace(cfg, model=replace(cfg.model, num_layers=layers), data=data)


def train(cfg: Config) -> stages.Traced:
    """The training step, its state donated."""
    wrapped = stages.jit(train_step.make_train_step(cfg), donate=0)
    return wrapped.trace(*train_step.abstract_arguments(cfg))


def evaluation(cfg: Config) -> stages.Traced:
    """The validation step of cfg, traced."""
    return stages.jit(train_step.make_eval_step(cfg)).trace(*evaluation_arguments(cfg))


def evaluation_arguments(cfg: Config) -> tuple[Tree, ...]:
    """The declarations of what a validation step takes: parameters and a batch."""
    return train_step.abstract_state(cfg).params, train_step.abstract_batch(cfg)


def lower(
    traced: stages.Traced, cfg: Config, mesh: Mesh, observe: passes.Observer = passes.unobserved
) -> stages.Lowered:
    """`traced` for one device of `mesh`, as cfg's mesh section says; UserError where it cannot be partitioned."""
    m = cfg.mesh
    remat = Remat(m.remat, tuple(_listed(m.remat_names)), int(m.remat_gb * 1e9), m.regather)
    return traced.lower(mesh, rules(cfg, mesh), _listed(m.without), m.fuse, remat, observe, pipeline=pipeline(cfg))
